"""Arrays of other libraries than torch: numpy, CuPy, JAX, and whatever speaks DLPack and the array API."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

from sageattention import _native, _values
from sageattention._request import Request, kv_rows, native_options

# Codes of the DLPack specification.
_CPU_DEVICES = (1, 3)
_CUDA_DEVICES = (2, 13)


class Library(NamedTuple):
    """What must be known of a library to compute its arrays."""

    name: str
    empty: Callable[[Any, tuple[int, ...], Optional[str]], Any]
    """An array like another, of a shape, and of a dtype unless it is None."""
    raw: Callable[[str, Any], Any]
    """An array, and its name in messages, as the Rust module takes it."""
    integers: Callable[[Any, list[int]], Any]
    """A list as an array of int32, where another array is."""
    gpu: Callable[[str, Any], Optional[int]]
    """The number of the GPU where an array of a name is, or None on the CPU."""
    stream: Callable[[Any], Optional[tuple[int, int]]]
    """The GPU's number and the current stream, or None on the CPU."""
    wait: bool
    """Whether the library cannot know of work on that stream, so that it must be done when the call returns."""


def dense(
    q: Any,
    k: Any,
    v: Any,
    request: Request,
    attn_mask: Any,
    sinks: Any,
    kv_lens: Any,
    block_mask: Optional[tuple[Any, int, int]],
    return_lse: bool,
) -> Any:
    """See `_frameworks.dense`."""
    library = library_of(q, k=k, v=v, attn_mask=attn_mask, sinks=sinks)
    lse_shape = dense_lse_shape(q, request)
    blocks = None if block_mask is None else (library.raw("block_mask", block_mask[0]), *block_mask[1:])
    mask = None if attn_mask is None else library.raw("mask", attn_mask)
    return forward(
        library,
        q,
        k,
        v,
        request,
        lse_shape if return_lse else None,
        mask=mask,
        block_mask=blocks,
        sinks=None if sinks is None else library.raw("sinks", sinks),
        kv_lens=key_lengths(library, kv_lens, q, k, request.tensor_layout),
    )


def key_lengths(library: Library, kv_lens: Any, q: Any, k: Any, tensor_layout: str) -> Any:
    """Lengths of keys as the Rust module takes them: those in the host's memory, a list or an array of numpy's, are
    checked and put beside q; what is of q's own library is read where it is, and is int32."""
    if kv_lens is None:
        return None
    if isinstance(kv_lens, (list, tuple)) or _root(kv_lens) == "numpy":
        kv_lens = library.integers(q, _values.lengths("kv_lens", kv_lens, kv_rows(k, tensor_layout)))
    library_of(q, kv_lens=kv_lens)
    return library.raw("kv_lens", kv_lens)


def dense_lse_shape(q: Any, request: Request) -> tuple[int, ...]:
    """The shape of a log-sum-exp."""
    shape = tuple(q.shape)
    if len(shape) != 4:
        # The Rust module refuses q before it looks at the log-sum-exp.
        return ()
    heads, rows = (shape[2], shape[1]) if request.tensor_layout == "NHD" else (shape[1], shape[2])
    return (shape[0], heads, rows)


def varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    request: Request,
    sinks: Any,
    return_lse: bool,
) -> Any:
    """See `_frameworks.varlen`."""
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return forward_packed(q, k, v, lengths, request, sinks, return_lse)


def forward_packed(
    q: Any,
    k: Any,
    v: Any,
    lengths: tuple[Any, Any, Optional[int], Optional[int]],
    request: Request,
    sinks: Any,
    return_lse: bool,
    **arguments: Any,
) -> Any:
    """Attention of packed sequences; `lengths` are the boundaries of queries and of keys and the longest of either, and
    `arguments` others of `_native.forward`."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = lengths
    library = library_of(q, k=k, v=v, sinks=sinks)
    if library.name not in ("numpy", "cupy"):
        raise NotImplementedError(f"cu_seqlens of {library.name} is not supported: use numpy, CuPy or torch")
    cu_seqlens_q, cu_seqlens_k = (
        sys.modules[library.name].asarray(_values.boundaries(name, given), dtype="int64")
        if isinstance(given, (list, tuple))
        else given
        for name, given in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k))
    )
    library_of(q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    boundaries = []
    for name, given in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if given.dtype.name not in ("int32", "int64"):
            raise TypeError(f"{name}: dtype is {given.dtype.name}, expected int32 or int64")
        if given.ndim != 1 or given.size == 0:
            raise ValueError(f"{name}: shape is {list(given.shape)}, expected [batch + 1]")
        if library.name == "numpy" and given.dtype.name == "int64" and (abs(given) >= 2**31).any():
            raise ValueError(f"{name}: value is {abs(given).max()}, expected at most {2**31 - 1}: int32")
        compact = library.empty(given, given.shape, "int32")
        # On a GPU they are not looked at, but cut off rather than taken modulo 2**32.
        compact[...] = given.clip(1 - 2**31, 2**31 - 1)
        boundaries.append(compact)
    if boundaries[0].size != boundaries[1].size:
        raise ValueError(
            f"cu_seqlens_k: shape is {list(cu_seqlens_k.shape)}, expected {list(cu_seqlens_q.shape)}, as cu_seqlens_q"
        )
    if max_seqlen_q is None:
        max_seqlen_q = _longest(boundaries[0])
    if max_seqlen_k is None:
        max_seqlen_k = _longest(boundaries[1])
    addresses = [library.raw("cu_seqlens", compact)[0] for compact in boundaries]
    packed = (*addresses, boundaries[0].size - 1, max_seqlen_q, max_seqlen_k)
    lse_shape = (q.shape[1], q.shape[0]) if len(q.shape) == 3 else ()
    of_heads = None if sinks is None else library.raw("sinks", sinks)
    return forward(
        library, q, k, v, request, lse_shape if return_lse else None, packed=packed, sinks=of_heads, **arguments
    )


def _longest(boundaries: Any) -> int:
    """The longest sequence; a GPU is waited for."""
    return max(0, int((boundaries[1:] - boundaries[:-1]).max())) if boundaries.size > 1 else 0


def forward(
    library: Library, q: Any, k: Any, v: Any, request: Request, lse_shape: Optional[tuple[int, ...]], **arguments: Any
) -> Any:
    """Computes into new arrays: the output, or a pair of it and the log-sum-exp; `arguments` are those of
    `_native.forward`."""
    out = library.empty(q, (*q.shape[:-1], *v.shape[-1:]), None)
    lse = None if lse_shape is None else library.empty(q, lse_shape, "float32")
    _native.forward(
        library.raw("q", q),
        library.raw("k", k),
        library.raw("v", v),
        library.raw("out", out),
        native_options(request),
        lse=None if lse is None else library.raw("lse", lse),
        stream=library.stream(q),
        wait=library.wait,
        **arguments,
    )
    return out if lse is None else (out, lse)


def library_of(q: Any, **others: Any) -> Library:
    root = _root(q)
    _check_plain("q", q)
    if root == "numpy" and hasattr(q, "__array_interface__"):
        library = _NUMPY
    elif root == "cupy":
        library = _CUPY
    elif hasattr(q, "__dlpack__") and hasattr(q, "__array_namespace__"):
        library = _ANY
    else:
        raise TypeError(
            f"q: type is {type(q).__name__}, expected a tensor of torch, numpy, CuPy, JAX or another library that has "
            "__dlpack__ and __array_namespace__"
        )
    for name, array in others.items():
        if array is None:
            continue
        _check_plain(name, array)
        if _root(array) != root:
            raise TypeError(f"{name}: type is {type(array).__name__}, expected an array of {root}, as q")
        found, wanted = library.gpu(name, array), library.gpu("q", q)
        if found != wanted:
            raise ValueError(f"{name}: device is {_named(found)}, expected {_named(wanted)}, as q")
    return library


def _named(gpu: Optional[int]) -> str:
    return "cpu" if gpu is None else f"cuda:{gpu}"


def _check_plain(name: str, array: Any) -> None:
    """Refuses what looks like an array and has no numbers, or numbers that do not count."""
    jax, numpy = sys.modules.get("jax"), sys.modules.get("numpy")
    if jax is not None and isinstance(array, jax.core.Tracer):
        raise NotImplementedError(
            f"{name}: traced by JAX (jit, grad, jvp, vmap), expected an array with values: call it outside"
        )
    if numpy is not None and isinstance(array, numpy.ma.MaskedArray):
        raise TypeError(f"{name}: type is MaskedArray, expected a plain array: hidden keys are attn_mask's to say")


def _root(array: Any) -> str:
    """The package that an array's type is of."""
    return type(array).__module__.partition(".")[0]


def _strides(name: str, array: Any) -> tuple[int, ...]:
    """Strides in elements."""
    if any(stride % array.itemsize for stride in array.strides):
        raise ValueError(
            f"{name}: strides are {array.strides} bytes, expected multiples of {array.itemsize}, the element's size"
        )
    return tuple(stride // array.itemsize for stride in array.strides)


def _with_neighbouring_channels(array: Any) -> Any:
    """The array, copied where the channels of a head are not neighbours in memory; masks may lie as they like."""
    if array.ndim and array.shape[-1] > 1 and array.strides[-1] != array.itemsize and array.dtype.kind != "b":
        return array.copy(order="C")
    return array


def _numpy_raw(name: str, array: Any) -> Any:
    if not array.dtype.isnative:
        raise TypeError(f"{name}: dtype is {array.dtype.str}, expected this machine's byte order")
    array = _with_neighbouring_channels(array)
    return _Owned((array.ctypes.data, array.shape, _strides(name, array), array.dtype.name), array)


class _Owned(tuple):
    """A raw tensor that keeps its memory alive: a copy must outlive the call."""

    owner: Any

    def __new__(cls, raw: tuple[Any, ...], owner: Any) -> "_Owned":
        self = super().__new__(cls, raw)
        self.owner = owner
        return self


def _numpy_empty(array: Any, shape: tuple[int, ...], dtype: Optional[str]) -> Any:
    return sys.modules["numpy"].empty(shape, array.dtype if dtype is None else dtype)


def _numpy_integers(array: Any, values: list[int]) -> Any:
    return sys.modules["numpy"].array(values, dtype="int32")


def _cupy_raw(name: str, array: Any) -> Any:
    array = _with_neighbouring_channels(array)
    return _Owned((array.data.ptr, array.shape, _strides(name, array), array.dtype.name), array)


def _cupy_empty(array: Any, shape: tuple[int, ...], dtype: Optional[str]) -> Any:
    with array.device:
        return sys.modules["cupy"].empty(shape, array.dtype if dtype is None else dtype)


def _cupy_integers(array: Any, values: list[int]) -> Any:
    with array.device:
        return sys.modules["cupy"].array(values, dtype="int32")


def _cupy_stream(array: Any) -> tuple[int, int]:
    with array.device:
        return (array.device.id, sys.modules["cupy"].cuda.get_current_stream().ptr)


def _any_raw(name: str, array: Any) -> Any:
    # A library whose streams are its own, such as JAX, has finished the array then; others' `__dlpack__` waits.
    if hasattr(array, "block_until_ready"):
        array.block_until_ready()
    return array.__dlpack__()


def _any_empty(array: Any, shape: tuple[int, ...], dtype: Optional[str]) -> Any:
    # Fresh, and nobody else's: writing to it through DLPack is not seen as a change, even where arrays are immutable.
    namespace = array.__array_namespace__()
    kind = array.dtype if dtype is None else getattr(namespace, dtype)
    return namespace.empty(shape, dtype=kind, device=array.device)


def _any_integers(array: Any, values: list[int]) -> Any:
    namespace = array.__array_namespace__()
    return namespace.asarray(values, dtype=namespace.int32, device=array.device)


def _any_gpu(name: str, array: Any) -> Optional[int]:
    kind, number = array.__dlpack_device__()
    if int(kind) in _CPU_DEVICES:
        return None
    if int(kind) in _CUDA_DEVICES:
        return int(number)
    raise NotImplementedError(f"{name}: DLPack device is {int(kind)}, expected the CPU (1) or CUDA (2)")


def _any_stream(array: Any) -> Optional[tuple[int, int]]:
    gpu = _any_gpu("q", array)
    # The legacy default stream.
    return None if gpu is None else (gpu, 0)


_NUMPY = Library(
    "numpy", _numpy_empty, _numpy_raw, _numpy_integers, lambda name, array: None, lambda array: None, wait=False
)
_CUPY = Library(
    "cupy", _cupy_empty, _cupy_raw, _cupy_integers, lambda name, array: array.device.id, _cupy_stream, wait=False
)
_ANY = Library("this library", _any_empty, _any_raw, _any_integers, _any_gpu, _any_stream, wait=True)
