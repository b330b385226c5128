"""A stand-in for `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import logging
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sageattention import _native, _torch
from sageattention._request import Request
from sageattention.plug_in import tally

_log = logging.getLogger("sageattention")

_torch_sdpa = F.scaled_dot_product_attention
_scheme: Optional[str] = None


def patch(scheme: Optional[str]) -> None:
    """See `plug_in.patch`."""
    global _scheme
    names = [name for name, _ in _native.schemes()]
    if scheme is not None and scheme not in names:
        raise ValueError(f"scheme: value is {scheme}, expected one of {', '.join(names)}")
    _scheme = scheme
    F.scaled_dot_product_attention = scaled_dot_product_attention


def unpatch() -> None:
    """See `plug_in.unpatch`."""
    restore((_torch_sdpa, None))


def state() -> tuple[Any, Optional[str]]:
    """What is in place."""
    return (F.scaled_dot_product_attention, _scheme)


def restore(before: tuple[Any, Optional[str]]) -> None:
    """Puts back what was in place."""
    global _scheme
    F.scaled_dot_product_attention, _scheme = before


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function, computed in 8 bits where that is possible; see `sageattention.patch`."""
    reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        _fell_back(reason)
        return _torch_sdpa(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
    dtype = _autocast_dtype(query)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    if query.ndim == 3:
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unsqueeze(1)
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        return _sdpa_op(query, key, value, attn_mask, is_causal, scale, _scheme).squeeze(1)
    return _sdpa_op(query, key, value, attn_mask, is_causal, scale, _scheme)


def _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> Optional[str]:
    """Why torch must compute a call, in words that are the same for all such calls."""
    if dropout_p > 0.0:
        return "dropout_p is above 0"
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a tensor requires its gradient, and there is no backward pass yet"
    if not torch.compiler.is_compiling() and any(
        type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors
    ):
        return "a tensor is of a subclass of torch.Tensor"
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return "a tensor is not strided"
    device = query.device
    if device.type not in ("cpu", "cuda") or torch.version.hip is not None:
        return f"tensors are on {device.type}"
    if any(tensor.device != device for tensor in tensors):
        return "tensors are on several devices"
    dtype = _autocast_dtype(query)
    dtypes = (
        (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float16, torch.bfloat16, torch.float32)
    )
    if (dtype or query.dtype) not in dtypes:
        return f"tensors are {query.dtype} on {device.type}"
    if dtype is None and not query.dtype == key.dtype == value.dtype:
        return "tensors are of several dtypes"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    if query.ndim not in (3, 4) or not query.ndim == key.ndim == value.ndim:
        return "tensors have other than 3 or 4 dimensions"
    if not 1 <= query.shape[-1] <= 256 or not query.shape[-1] == key.shape[-1] == value.shape[-1]:
        return "head_dim is above 256, or not the same for query, key and value"
    if key.shape != value.shape or query.shape[0] != key.shape[0]:
        return "batches or heads are broadcast"
    if query.ndim == 4 and query.shape[1] != key.shape[1]:
        if not enable_gqa or key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
            return "heads are broadcast"
    if query.numel() == 0 or key.numel() == 0:
        return "a tensor has no element"
    if scale is not None and not 0.0 < scale < float("inf"):
        return "scale is not a finite number above 0"
    if attn_mask is not None:
        if is_causal:
            return "attn_mask comes with is_causal"
        if attn_mask.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float32):
            return f"attn_mask is {attn_mask.dtype}"
        if attn_mask.ndim > query.ndim or attn_mask.ndim < 2:
            return "attn_mask has other than 2 to 4 dimensions"
    return None


def _autocast_dtype(query: Tensor) -> Optional[torch.dtype]:
    """The dtype that autocast casts to, if it is on: torch's function is on its list."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@torch.compiler.assume_constant_result
def _fell_back(reason: str) -> None:
    # Under torch.compile this runs once, while compiling.
    if tally.fell_back(reason):
        _log.warning("scaled_dot_product_attention is left to torch: %s", reason)


def _sdpa(query, key, value, attn_mask, is_causal, scale, scheme):
    tally.accelerated()
    out = torch.empty_like(query)
    request = Request(causal="top_left" if is_causal else None, sm_scale=scale, scheme=scheme)
    _torch.forward(query, key, value, out, request, attn_mask=attn_mask)
    return out


def _sdpa_fake(query, *_):
    # As q's heads lie in memory: for `[batch, seq, heads, head_dim]` seen as heads first, joining heads copies nothing.
    return torch.empty_like(query)


_sdpa_op = _torch.define_operator(
    "sdpa",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, str? scheme) -> Tensor",
    _sdpa,
    _sdpa_fake,
)
