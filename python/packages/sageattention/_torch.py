"""torch's tensors: the operators, and what they do to memory."""

from __future__ import annotations

import typing
from typing import Any, Optional

import torch
from torch import Tensor

from sageattention import _flops, _native, _values
from sageattention._arrays import Library
from sageattention._operators import Operator, define_operator, is_plain
from sageattention._request import Request, dense_shape, kv_rows, native_options
from sageattention._tally import tally
from sageattention._torch_inputs import autocast, capability, check_tensors, plain_mask, refuse_derivatives

_OLDEST = (2, 4)


def version_is_at_least(*wanted: int) -> bool:
    """Whether torch is of a version (major, minor), or later."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= wanted


def major_capability(x: Tensor) -> Optional[int]:
    """See `_frameworks.major_capability`."""
    return capability(x.device)[0] if x.device.type == "cuda" else None


if not version_is_at_least(*_OLDEST):
    raise ImportError(f"torch: version is {torch.__version__}, expected {_OLDEST[0]}.{_OLDEST[1]} or later")

_SCHEMA_TYPES = {
    str: "str",
    bool: "bool",
    int: "int",
    Optional[str]: "str?",
    Optional[int]: "int?",
    Optional[float]: "float?",
    list[float]: "float[]",
    list[int]: "int[]",
    Optional[list[float]]: "float[]?",
    Optional[list[int]]: "int[]?",
}


def schema_of(fields: type) -> str:
    """The fields of a named tuple, as arguments of an operator."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in typing.get_type_hints(fields).items())


OPTIONS = schema_of(Request)
_DENSE = (
    "Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? sinks, Tensor? kv_lens, Tensor? block_mask, int block_q, "
    f"int block_k, {OPTIONS}"
)
PACKED = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k"
)
_VARLEN = f"{PACKED}, {OPTIONS}"

# What kernels read is int32.
_LARGEST_INT = 2**31 - 1


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    attn_mask: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    kv_lens: Any = None,
    block_mask: Optional[tuple[Tensor, int, int]] = None,
    return_lse: bool = False,
) -> Any:
    """See `_frameworks.dense`."""
    blocks, block_q, block_k = block_mask if block_mask is not None else (None, 0, 0)
    kv_lens = key_lengths(kv_lens, q, k, request.tensor_layout)
    operator = _dense_lse_op if return_lse else _dense_op
    call = operator.compute
    if not is_plain(q, k, v, attn_mask, sinks, kv_lens, blocks):
        attn_mask = plain_mask(attn_mask, q.device)
        check_tensors(q, k=k, v=v, attn_mask=attn_mask, sinks=sinks, kv_lens=kv_lens, block_mask=blocks)
        refuse_derivatives(q=q, k=k, v=v, attn_mask=attn_mask, sinks=sinks)
        call = operator.overload
    q, k, v, attn_mask = autocast(q, k, v, attn_mask)
    return call(q, k, v, attn_mask, sinks, kv_lens, blocks, block_q, block_k, *request)


def key_lengths(kv_lens: Any, q: Tensor, k: Tensor, tensor_layout: str) -> Optional[Tensor]:
    """Lengths of keys as a tensor beside q. A list, an array or a tensor that has to be copied there is checked first;
    a tensor beside q is left to the call."""
    if kv_lens is None:
        return None
    if torch.compiler.is_compiling() and not isinstance(kv_lens, (list, tuple)):
        # What is traced has no values to look at.
        kv_lens = torch.as_tensor(kv_lens)
        return kv_lens.to(q.device) if kv_lens.device.type == "cpu" else kv_lens
    if isinstance(kv_lens, torch.Tensor):
        if kv_lens.device == q.device or kv_lens.device.type != "cpu":
            return kv_lens
        if type(kv_lens) is not Tensor:
            return kv_lens.to(q.device)
        kv_lens = kv_lens.tolist()
    return integers(q, _values.lengths("kv_lens", kv_lens, kv_rows(k, tensor_layout)))


def integers(like: Tensor, values: list[int]) -> Tensor:
    """A list as int32 beside a tensor."""
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    request: Request,
    sinks: Optional[Tensor],
    return_lse: bool,
) -> Any:
    """See `_frameworks.varlen`."""
    operator = _varlen_lse_op if return_lse else _varlen_op
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return call_packed(operator, (q, k, v), lengths, sinks, request)


def call_packed(
    operator: Operator,
    qkv: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[Any, Any, Optional[int], Optional[int]],
    sinks: Optional[Tensor],
    options: tuple[Any, ...],
) -> Any:
    """Calls an operator of packed sequences: its arguments are q, k, v, sinks, the boundaries of queries and of keys,
    the longest of either, and then `options`."""
    (q, k, v), (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) = qkv, lengths
    call = operator.compute
    if not is_plain(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k):
        check_tensors(q, k=k, v=v, sinks=sinks)
        refuse_derivatives(q=q, k=k, v=v, sinks=sinks)
        call = operator.overload
    q, k, v = autocast(q, k, v)
    cu_seqlens_q, cu_seqlens_k = _listed("cu_seqlens_q", cu_seqlens_q, q), _listed("cu_seqlens_k", cu_seqlens_k, q)
    if max_seqlen_q is None:
        max_seqlen_q = _longest(cu_seqlens_q, q)
    if max_seqlen_k is None:
        max_seqlen_k = _longest(cu_seqlens_k, k)
    return call(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options)


def _listed(name: str, cu_seqlens: Any, q: Tensor) -> Tensor:
    """Boundaries as a tensor; a list of them is one."""
    if isinstance(cu_seqlens, (list, tuple)):
        return torch.tensor(_values.boundaries(name, cu_seqlens), dtype=torch.int64, device=q.device)
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"{name}: type is {type(cu_seqlens).__name__}, expected torch.Tensor or a list of integers")
    return cu_seqlens


def _longest(cu_seqlens: Tensor, packed: Tensor) -> int:
    """The longest sequence; where that would stop a graph, or is not needed, all rows, which no sequence exceeds."""
    rows = packed.shape[0]
    if torch.compiler.is_compiling() or packed.device.type != "cuda" or cu_seqlens.numel() < 2:
        return rows
    if torch.cuda.is_current_stream_capturing():
        return rows
    return min(rows, max(0, int(cu_seqlens.diff().max())))


def library_of(q: Tensor, **others: Any) -> Library:
    """See `_frameworks.library_of`."""
    check_tensors(q, **others)
    refuse_derivatives(q=q, **others)
    return _LIBRARY


def _empty(tensor: Tensor, shape: tuple[int, ...], dtype: Optional[str]) -> Tensor:
    return torch.empty(shape, dtype=tensor.dtype if dtype is None else getattr(torch, dtype), device=tensor.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    request: tuple[Any, ...],
    *,
    lse: Optional[Tensor] = None,
    attn_mask: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    kv_lens: Optional[Tensor] = None,
    block_mask: Optional[tuple[Tensor, int, int]] = None,
    cu_seqlens: Optional[tuple[Tensor, Tensor, int, int]] = None,
    predictor: Optional[_native.Predictor] = None,
    block_map: Optional[Tensor] = None,
) -> None:
    """Computes on q's device and, on a GPU, the caller's current stream. `request` is a `Request`'s fields."""
    q, k, v = with_neighbouring_channels(q), with_neighbouring_channels(k), with_neighbouring_channels(v)
    packed = None
    if cu_seqlens is not None:
        on_device = [_boundaries(name, t, q) for name, t in zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens[:2])]
        if on_device[0].numel() != on_device[1].numel():
            found, wanted = list(on_device[1].shape), list(on_device[0].shape)
            raise ValueError(f"cu_seqlens_k: shape is {found}, expected {wanted}, as cu_seqlens_q")
        packed = (on_device[0].data_ptr(), on_device[1].data_ptr(), on_device[0].numel() - 1, *cu_seqlens[2:])
    stream = current_stream(q)
    _native.forward(
        q,
        k,
        v,
        out,
        native_options(request),
        lse,
        attn_mask,
        block_mask,
        packed,
        stream,
        False,
        predictor,
        block_map,
        sinks,
        None if kv_lens is None else int32_list("kv_lens", kv_lens, q, "[batch]"),
    )
    tally.accelerated()


def with_neighbouring_channels(tensor: Tensor) -> Tensor:
    """The tensor, copied where the channels of a head are not neighbours in memory."""
    strides = tensor.stride()
    if strides and strides[-1] != 1 and tensor.shape[-1] > 1:
        return tensor.contiguous()
    return tensor


def _boundaries(name: str, cu_seqlens: Tensor, q: Tensor) -> Tensor:
    if cu_seqlens.numel() == 0:
        raise ValueError(f"{name}: shape is {list(cu_seqlens.shape)}, expected [batch + 1]")
    return int32_list(name, cu_seqlens, q, "[batch + 1]")


def int32_list(name: str, values: Tensor, q: Tensor, wanted: str) -> Tensor:
    """Integers of one dimension as kernels read them, where q is."""
    if values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: dtype is {str(values.dtype).removeprefix('torch.')}, expected int32 or int64")
    if values.ndim != 1:
        raise ValueError(f"{name}: shape is {list(values.shape)}, expected {wanted}")
    if values.dtype == torch.int64 and values.device.type == "cpu":
        wide = (values.abs() > _LARGEST_INT).nonzero().flatten().tolist()
        if wide:
            raise ValueError(f"{name}[{wide[0]}]: value is {values[wide[0]]}, expected at most {_LARGEST_INT}: int32")
    elif values.dtype == torch.int64:
        # Not looked at, but cut off rather than taken modulo 2**32.
        values = values.clamp(-_LARGEST_INT, _LARGEST_INT)
    return values.to(device=q.device, dtype=torch.int32).contiguous()


def current_stream(q: Tensor) -> Optional[tuple[int, int]]:
    if not q.is_cuda:
        return None
    if torch.version.hip is not None:
        raise NotImplementedError(f"q: device is {q.device} of AMD, expected cpu or an NVIDIA GPU")
    ordinal = q.get_device()
    # The handle alone: an object of torch.cuda's takes as long as a launch.
    return (ordinal, torch._C._cuda_getCurrentRawStream(ordinal))


_LIBRARY = Library(
    "torch",
    _empty,
    lambda name, tensor: with_neighbouring_channels(tensor),
    integers,
    lambda name, tensor: tensor.get_device() if tensor.is_cuda else None,
    current_stream,
    wait=False,
)


def lse_like(q: Tensor, tensor_layout: str) -> Tensor:
    batch, heads, rows = q.shape[0], q.shape[-3], q.shape[-2]
    if tensor_layout == "NHD":
        heads, rows = rows, heads
    return torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)


def check_rank(name: str, tensor: Tensor, rank: int, wanted: str) -> None:
    """Rust says the same, but the shapes of the outputs are needed first."""
    if tensor.ndim != rank:
        raise ValueError(f"{name}: shape is {list(tensor.shape)}, expected {wanted}")


def _dense(q, k, v, attn_mask, sinks, kv_lens, block_mask, block_q, block_k, *request):
    out = out_like(q, k, v)
    blocks = None if block_mask is None else (block_mask, block_q, block_k)
    forward(q, k, v, out, request, attn_mask=attn_mask, sinks=sinks, kv_lens=kv_lens, block_mask=blocks)
    return out


def _dense_lse(q, k, v, attn_mask, sinks, kv_lens, block_mask, block_q, block_k, *request):
    out, lse = _dense_lse_fake(q, k, v, attn_mask, sinks, kv_lens, block_mask, block_q, block_k, *request)
    blocks = None if block_mask is None else (block_mask, block_q, block_k)
    forward(q, k, v, out, request, lse=lse, attn_mask=attn_mask, sinks=sinks, kv_lens=kv_lens, block_mask=blocks)
    return out, lse


def _varlen(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *request):
    out = out_like(q, k, v)
    cu_seqlens = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    forward(q, k, v, out, request, sinks=sinks, cu_seqlens=cu_seqlens)
    return out


def varlen_lse_like(q: Tensor) -> Tensor:
    """Memory for a log-sum-exp of packed sequences."""
    check_rank("q", q, 3, "[total, heads, head_dim]")
    return torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)


def _varlen_lse(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *request):
    out, lse = _varlen_lse_fake(q, k, v)
    cu_seqlens = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    forward(q, k, v, out, request, lse=lse, sinks=sinks, cu_seqlens=cu_seqlens)
    return out, lse


def out_like(q, k, v, *_):
    """Memory for an output: q's rows of v's channels."""
    return q.new_empty(q.shape[:-1] + v.shape[-1:])


def _dense_lse_fake(q, k, v, attn_mask, sinks, kv_lens, block_mask, block_q, block_k, tensor_layout, *_):
    check_rank("q", q, 4, dense_shape(tensor_layout))
    return out_like(q, k, v), lse_like(q, tensor_layout)


def _varlen_lse_fake(q, k, v, *_):
    return out_like(q, k, v), varlen_lse_like(q)


_dense_op = define_operator("dense", f"({_DENSE}) -> Tensor", _dense, out_like)
_dense_lse_op = define_operator("dense_lse", f"({_DENSE}) -> (Tensor, Tensor)", _dense_lse, _dense_lse_fake)
_varlen_op = define_operator("varlen", f"({_VARLEN}) -> Tensor", _varlen, out_like)
_varlen_lse_op = define_operator("varlen_lse", f"({_VARLEN}) -> (Tensor, Tensor)", _varlen_lse, _varlen_lse_fake)

# Their argument of this index is the first of the request's, `tensor_layout`.
_flops.register(layout_position=9)
