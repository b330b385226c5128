"""torch's tensors: custom operators, so that compilers and graphs see one node, and what they do to memory."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from sageattention import _native
from sageattention._request import Request, native_options

_OLDEST = (2, 4)
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST:
    raise ImportError(f"torch: version is {torch.__version__}, expected {_OLDEST[0]}.{_OLDEST[1]} or later")

_DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.bool: "bool",
}

_OPTIONS = (
    "str tensor_layout, str? causal, int? window_left, int? window_right, float? sm_scale, float? logit_softcap, "
    "str? scheme, bool nearest, bool smooth_k"
)
_DENSE = f"Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? block_mask, int block_q, int block_k, {_OPTIONS}"
_VARLEN = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    f"SymInt max_seqlen_k, {_OPTIONS}"
)

# The registrations live as long as this object.
_LIBRARY = torch.library.Library("sageattention", "DEF")


def define_operator(name: str, schema: str, compute: Any, fake: Any) -> Any:
    """An operator of torch with what it computes, and what shapes it gives without computing."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, compute, device)
    torch.library.register_fake(f"sageattention::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sageattention, name).default


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    attn_mask: Optional[Tensor],
    block_mask: Optional[tuple[Tensor, int, int]],
    return_lse: bool,
) -> Any:
    """See `_frameworks.dense`."""
    blocks, block_q, block_k = block_mask if block_mask is not None else (None, 0, 0)
    check_devices(q, k=k, v=v, attn_mask=attn_mask, block_mask=blocks)
    refuse_gradients(q=q, k=k, v=v, attn_mask=attn_mask)
    operator = _dense_lse_op if return_lse else _dense_op
    return operator(q, k, v, attn_mask, blocks, block_q, block_k, *request)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    request: Request,
    return_lse: bool,
) -> Any:
    """See `_frameworks.varlen`."""
    check_devices(q, k=k, v=v)
    refuse_gradients(q=q, k=k, v=v)
    operator = _varlen_lse_op if return_lse else _varlen_op
    return operator(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *request)


def check_devices(q: Tensor, **others: Optional[Tensor]) -> None:
    """Refuses devices that nothing here computes on, and tensors that are not where q is."""
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"q: device is {q.device}, expected cpu or cuda")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: type is {type(tensor).__name__}, expected torch.Tensor, as q")
        if tensor.device != q.device:
            raise ValueError(f"{name}: device is {tensor.device}, expected {q.device}, as q")


def refuse_gradients(**tensors: Optional[Tensor]) -> None:
    """There is no backward pass yet, and a gradient that is silently missing would be worse than none."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"{name}: requires_grad is True, expected False: there is no backward pass yet; "
                "call under torch.no_grad() or torch.inference_mode()"
            )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    request: Request,
    *,
    lse: Optional[Tensor] = None,
    attn_mask: Optional[Tensor] = None,
    block_mask: Optional[tuple[Tensor, int, int]] = None,
    cu_seqlens: Optional[tuple[Tensor, Tensor, int, int]] = None,
) -> None:
    """Computes on q's device and, on a GPU, the caller's current stream."""
    q, k, v = _with_neighbouring_channels(q), _with_neighbouring_channels(k), _with_neighbouring_channels(v)
    packed = None
    if cu_seqlens is not None:
        on_device = [_boundaries(name, t, q) for name, t in zip(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens[:2])]
        if on_device[0].numel() != on_device[1].numel():
            found, wanted = list(on_device[1].shape), list(on_device[0].shape)
            raise ValueError(f"cu_seqlens_k: shape is {found}, expected {wanted}, as cu_seqlens_q")
        packed = (on_device[0].data_ptr(), on_device[1].data_ptr(), on_device[0].numel() - 1, *cu_seqlens[2:])
    _native.forward(
        _raw(q),
        _raw(k),
        _raw(v),
        _raw(out),
        native_options(request),
        lse=None if lse is None else _raw(lse),
        mask=None if attn_mask is None else _raw(attn_mask),
        block_mask=None if block_mask is None else (_raw(block_mask[0]), *block_mask[1:]),
        packed=packed,
        stream=_current_stream(q.device),
    )


def _with_neighbouring_channels(tensor: Tensor) -> Tensor:
    """The tensor, copied where the channels of a head are not neighbours in memory."""
    if tensor.ndim > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return tensor.contiguous()
    return tensor


def _boundaries(name: str, cu_seqlens: Tensor, q: Tensor) -> Tensor:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: dtype is {_name(cu_seqlens.dtype)}, expected int32 or int64")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"{name}: shape is {list(cu_seqlens.shape)}, expected [batch + 1]")
    return cu_seqlens.to(device=q.device, dtype=torch.int32).contiguous()


def _raw(tensor: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], str]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), _name(tensor.dtype))


def _name(dtype: torch.dtype) -> str:
    return _DTYPES.get(dtype) or str(dtype).removeprefix("torch.")


def _current_stream(device: torch.device) -> Optional[tuple[int, int]]:
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        raise NotImplementedError(f"q: device is {device} of AMD, expected cpu or an NVIDIA GPU")
    return (device.index, torch.cuda.current_stream(device).cuda_stream)


def _lse_like(q: Tensor, tensor_layout: str) -> Tensor:
    batch, heads, rows = q.shape[0], q.shape[-3], q.shape[-2]
    if tensor_layout == "NHD":
        heads, rows = rows, heads
    return torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)


def _check_rank(q: Tensor, rank: int, wanted: str) -> None:
    # Rust says the same, but the shapes of the outputs are needed first.
    if q.ndim != rank:
        raise ValueError(f"q: shape is {list(q.shape)}, expected {wanted}")


def _dense(q, k, v, attn_mask, block_mask, block_q, block_k, *request):
    out = _out_like(q)
    blocks = None if block_mask is None else (block_mask, block_q, block_k)
    forward(q, k, v, out, Request(*request), attn_mask=attn_mask, block_mask=blocks)
    return out


def _dense_lse(q, k, v, attn_mask, block_mask, block_q, block_k, *request):
    out, lse = _dense_lse_fake(q, k, v, attn_mask, block_mask, block_q, block_k, *request)
    blocks = None if block_mask is None else (block_mask, block_q, block_k)
    forward(q, k, v, out, Request(*request), lse=lse, attn_mask=attn_mask, block_mask=blocks)
    return out, lse


def _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *request):
    out = _out_like(q)
    cu_seqlens = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    forward(q, k, v, out, Request(*request), cu_seqlens=cu_seqlens)
    return out


def _varlen_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *request):
    out, lse = _varlen_lse_fake(q)
    cu_seqlens = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    forward(q, k, v, out, Request(*request), lse=lse, cu_seqlens=cu_seqlens)
    return out, lse


def _out_like(q, *_):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _dense_lse_fake(q, k, v, attn_mask, block_mask, block_q, block_k, tensor_layout, *_):
    _check_rank(q, 4, "[batch, heads, seq, head_dim]" if tensor_layout != "NHD" else "[batch, seq, heads, head_dim]")
    return _out_like(q), _lse_like(q, tensor_layout)


def _varlen_lse_fake(q, *_):
    _check_rank(q, 3, "[total, heads, head_dim]")
    return _out_like(q), torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)


_dense_op = define_operator("dense", f"({_DENSE}) -> Tensor", _dense, _out_like)
_dense_lse_op = define_operator("dense_lse", f"({_DENSE}) -> (Tensor, Tensor)", _dense_lse, _dense_lse_fake)
_varlen_op = define_operator("varlen", f"({_VARLEN}) -> Tensor", _varlen, _out_like)
_varlen_lse_op = define_operator("varlen_lse", f"({_VARLEN}) -> (Tensor, Tensor)", _varlen_lse, _varlen_lse_fake)
