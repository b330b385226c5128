"""torch's tensors: attention over predicted blocks, and the prediction alone."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from sageattention import _flops, _native
from sageattention._block_maps import map_shape
from sageattention._operators import Operator, define_operator, is_plain
from sageattention._predictor import Fields, native_predictor
from sageattention._request import Request, dense_shape, native_options
from sageattention._torch import (
    OPTIONS,
    PACKED,
    call_packed,
    check_rank,
    current_stream,
    forward,
    int32_list,
    key_lengths,
    lse_like,
    out_like,
    schema_of,
    varlen_lse_like,
    with_neighbouring_channels,
)
from sageattention._torch_inputs import autocast, check_tensors, plain_mask, refuse_derivatives

_PREDICTOR = schema_of(Fields)
# Where the fields of a request begin among what follows the tensors.
_REQUEST = len(Fields._fields)
_SPARSE = f"Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? sinks, Tensor? kv_lens, {_PREDICTOR}, {OPTIONS}"
_PREDICT = f"Tensor q, Tensor k, Tensor? kv_lens, {_PREDICTOR}, {OPTIONS}"


def sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fields: Fields,
    request: Request,
    attn_mask: Optional[Tensor],
    sinks: Optional[Tensor],
    kv_lens: Any,
    return_lse: bool,
    return_map: bool,
) -> list[Tensor]:
    """See `_frameworks.sparse`."""
    kv_lens = key_lengths(kv_lens, q, k, request.tensor_layout)
    operator = _sparse_ops[return_lse, return_map]
    call = operator.compute
    if not is_plain(q, k, v, attn_mask, sinks, kv_lens):
        attn_mask = plain_mask(attn_mask, q.device)
        check_tensors(q, k=k, v=v, attn_mask=attn_mask, sinks=sinks, kv_lens=kv_lens)
        refuse_derivatives(q=q, k=k, v=v, attn_mask=attn_mask, sinks=sinks)
        call = operator.overload
    q, k, v, attn_mask = autocast(q, k, v, attn_mask)
    results = call(q, k, v, attn_mask, sinks, kv_lens, *fields, *request)
    return list(results) if return_lse or return_map else [results]


def sparse_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[Any, Any, Optional[int], Optional[int]],
    fields: Fields,
    request: Request,
    sinks: Optional[Tensor],
    return_lse: bool,
) -> Any:
    """See `_frameworks.sparse_varlen`."""
    return call_packed(_varlen_ops[return_lse], (q, k, v), lengths, sinks, (*fields, *request))


def predict(q: Tensor, k: Tensor, fields: Fields, request: Request, kv_lens: Any) -> Tensor:
    """See `_frameworks.predict`."""
    kv_lens = key_lengths(kv_lens, q, k, request.tensor_layout)
    call = _predict_op.compute
    if not is_plain(q, k, kv_lens):
        check_tensors(q, k=k, kv_lens=kv_lens)
        # A map has no derivative, and torch's rule for such results is that none is missed.
        q, k = q.detach(), k.detach()
        call = _predict_op.overload
    q, k = autocast(q, k)
    return call(q, k, kv_lens, *fields, *request)


def _sparse_operator(return_lse: bool, return_map: bool) -> Operator:
    """The operator with these results: one for each combination, as those of varying results have no rule for vmap."""

    def fake(q, k, v, attn_mask, sinks, kv_lens, *options):
        tensor_layout = options[_REQUEST]
        _check(q, k, tensor_layout)
        results = [out_like(q, k, v)]
        if return_lse:
            results.append(lse_like(q, tensor_layout))
        if return_map:
            results.append(_map_like(q, k, options))
        return tuple(results) if return_lse or return_map else results[0]

    def compute(q, k, v, attn_mask, sinks, kv_lens, *options):
        results = fake(q, k, v, attn_mask, sinks, kv_lens, *options)
        out, *others = results if return_lse or return_map else (results,)
        forward(
            q,
            k,
            v,
            out,
            options[_REQUEST:],
            lse=others[0] if return_lse else None,
            attn_mask=attn_mask,
            sinks=sinks,
            kv_lens=kv_lens,
            predictor=native_predictor(options[:_REQUEST]),
            block_map=others[-1] if return_map else None,
        )
        return results

    name = "sparse" + "_lse" * return_lse + "_map" * return_map
    returned = ", ".join(["Tensor"] * (1 + return_lse + return_map))
    return define_operator(name, f"({_SPARSE}) -> ({returned})", compute, fake)


def _varlen_operator(return_lse: bool) -> Operator:
    """The operator of packed sequences, with their log-sum-exp or without."""

    def fake(q, k, v, *_):
        out = out_like(q, k, v)
        return (out, varlen_lse_like(q)) if return_lse else out

    def compute(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options):
        results = fake(q, k, v)
        out, lse = results if return_lse else (results, None)
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        predictor = native_predictor(options[:_REQUEST])
        forward(q, k, v, out, options[_REQUEST:], lse=lse, sinks=sinks, cu_seqlens=lengths, predictor=predictor)
        return results

    name = "sparse_varlen" + "_lse" * return_lse
    returned = "(Tensor, Tensor)" if return_lse else "Tensor"
    return define_operator(name, f"({PACKED}, {_PREDICTOR}, {OPTIONS}) -> {returned}", compute, fake)


def _predict(q, k, kv_lens, *options):
    block_map = _predict_fake(q, k, kv_lens, *options)
    q, k = with_neighbouring_channels(q), with_neighbouring_channels(k)
    predictor = native_predictor(options[:_REQUEST])
    lens = None if kv_lens is None else int32_list("kv_lens", kv_lens, q, "[batch]")
    asked = native_options(options[_REQUEST:])
    _native.predict(q, k, block_map, asked, predictor, current_stream(q), kv_lens=lens)
    return block_map


def _predict_fake(q, k, kv_lens, *options):
    _check(q, k, options[_REQUEST])
    return _map_like(q, k, options)


def _check(q, k, tensor_layout):
    check_rank("q", q, 4, dense_shape(tensor_layout))
    check_rank("k", k, 4, dense_shape(tensor_layout))


def _map_like(q: Tensor, k: Tensor, options: tuple[Any, ...]) -> Tensor:
    fields = Fields(*options[:_REQUEST])
    shape = map_shape(q, k, options[_REQUEST], fields.block_q, fields.block_k)
    return torch.empty(shape, dtype=torch.bool, device=q.device)


_sparse_ops = {
    (lse, block_map): _sparse_operator(lse, block_map) for lse in (False, True) for block_map in (False, True)
}
_varlen_ops = {lse: _varlen_operator(lse) for lse in (False, True)}
_predict_op = define_operator("predict", f"({_PREDICT}) -> Tensor", _predict, _predict_fake)

# After q and k come v, the mask, the sinks and the lengths of keys.
_flops.register_sparse(layout_position=6 + _REQUEST)
