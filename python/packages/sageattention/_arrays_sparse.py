"""Arrays of other libraries than torch: attention over predicted blocks, and the prediction alone."""

from __future__ import annotations

from typing import Any, Optional

from sageattention import _native
from sageattention._arrays import Library, dense_lse_shape, forward, forward_packed, key_lengths, library_of
from sageattention._block_maps import map_shape
from sageattention._predictor import Fields, native_predictor
from sageattention._request import Request, dense_shape, native_options


def sparse(
    q: Any,
    k: Any,
    v: Any,
    fields: Fields,
    request: Request,
    attn_mask: Any,
    sinks: Any,
    kv_lens: Any,
    return_lse: bool,
    return_map: bool,
) -> list[Any]:
    """See `_frameworks.sparse`."""
    library = library_of(q, k=k, v=v, attn_mask=attn_mask, sinks=sinks)
    block_map = _map_like(library, q, k, fields, request) if return_map else None
    result = forward(
        library,
        q,
        k,
        v,
        request,
        dense_lse_shape(q, request) if return_lse else None,
        mask=None if attn_mask is None else library.raw("mask", attn_mask),
        sinks=None if sinks is None else library.raw("sinks", sinks),
        kv_lens=key_lengths(library, kv_lens, q, k, request.tensor_layout),
        predictor=native_predictor(fields),
        map=None if block_map is None else library.raw("map", block_map),
    )
    results = list(result) if return_lse else [result]
    return results if block_map is None else [*results, block_map]


def sparse_varlen(
    q: Any,
    k: Any,
    v: Any,
    lengths: tuple[Any, Any, Optional[int], Optional[int]],
    fields: Fields,
    request: Request,
    sinks: Any,
    return_lse: bool,
) -> Any:
    """See `_frameworks.sparse_varlen`."""
    predictor = native_predictor(fields)
    return forward_packed(q, k, v, lengths, request, sinks, return_lse, predictor=predictor)


def predict(q: Any, k: Any, fields: Fields, request: Request, kv_lens: Any) -> Any:
    """See `_frameworks.predict`."""
    library = library_of(q, k=k)
    block_map = _map_like(library, q, k, fields, request)
    _native.predict(
        library.raw("q", q),
        library.raw("k", k),
        library.raw("map", block_map),
        native_options(request),
        native_predictor(fields),
        stream=library.stream(q),
        wait=library.wait,
        kv_lens=key_lengths(library, kv_lens, q, k, request.tensor_layout),
    )
    return block_map


def _map_like(library: Library, q: Any, k: Any, fields: Fields, request: Request) -> Any:
    """Memory for the map of a prediction."""
    for name, array in (("q", q), ("k", k)):
        if len(array.shape) != 4:
            wanted = dense_shape(request.tensor_layout)
            raise ValueError(f"{name}: shape is {list(array.shape)}, expected {wanted}")
    shape = map_shape(q, k, request.tensor_layout, fields.block_q, fields.block_k)
    return library.empty(q, shape, "bool")
