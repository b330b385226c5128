"""Which calls are left to torch's own attention, and why."""

from __future__ import annotations

import logging
from typing import Any, Optional

import torch
from torch import Tensor

from sageattention._tally import tally
from sageattention._torch_inputs import autocast_dtype, has_tangent

_log = logging.getLogger("sageattention")

_MASK_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32)
# Smaller ones are 0 in single precision, larger ones infinite.
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-45, 3.4e38


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    dropout_p: float,
    is_causal: bool,
    scale: Optional[float],
    enable_gqa: bool,
) -> Optional[str]:
    """Why torch must compute a call of its function, in words that are the same for all such calls."""
    if dropout_p > 0.0:
        return "dropout_p is above 0"
    tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "a tensor requires its gradient, and there is no backward pass yet"
    if any(has_tangent(tensor) for tensor in tensors):
        return "a tensor has a tangent, and forward-mode derivatives are not computed"
    if not torch.compiler.is_compiling() and any(
        type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors
    ):
        return "a tensor is of a subclass of torch.Tensor"
    if any(tensor.is_nested or tensor.layout is not torch.strided for tensor in tensors):
        return "a tensor is not strided"
    device = query.device
    if device.type not in ("cpu", "cuda") or torch.version.hip is not None:
        return f"tensors are on {device.type}"
    if any(tensor.device != device for tensor in tensors):
        return "tensors are on several devices"
    return _why_not_dtypes(query, key, value) or _why_not_shapes(query, key, value, enable_gqa) or (
        _why_not_options(query, key, attn_mask, is_causal, scale)
    )  # fmt: skip


def _why_not_dtypes(query: Tensor, key: Tensor, value: Tensor) -> Optional[str]:
    device = query.device
    cast = autocast_dtype(device)
    dtypes = [
        cast if cast is not None and tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor.dtype
        for tensor in (query, key, value)
    ]
    if dtypes[0] != dtypes[1] or dtypes[0] != dtypes[2]:
        return "tensors are of several dtypes"
    if dtypes[0] not in (torch.float16, torch.bfloat16) and (device.type == "cuda" or dtypes[0] != torch.float32):
        return f"tensors are {dtypes[0]} on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


def _why_not_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Optional[str]:
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
    return None


def _why_not_options(
    query: Tensor, key: Tensor, attn_mask: Optional[Tensor], is_causal: bool, scale: Optional[float]
) -> Optional[str]:
    if isinstance(scale, (str, bytes, complex)):
        return "scale is no number"
    if scale is not None and not _SMALLEST_SCALE < scale < _LARGEST_SCALE:
        return "scale is not a finite number above 0"
    if attn_mask is not None:
        if is_causal:
            return "attn_mask comes with is_causal"
        if attn_mask.dtype not in _MASK_DTYPES:
            return f"attn_mask is {attn_mask.dtype}"
        if attn_mask.ndim > query.ndim or attn_mask.ndim < 2:
            return "attn_mask has other than 2 to 4 dimensions"
        # torch's own error, for programs that expect it; graphs with open shapes are not narrowed down for it.
        scores = (*query.shape[:-1], key.shape[-2])
        if not torch.compiler.is_compiling() and any(
            size not in (1, wanted) for size, wanted in zip(reversed(attn_mask.shape), reversed(scores))
        ):
            return "attn_mask does not broadcast to the scores"
    return None


@torch.compiler.assume_constant_result
def fell_back(what: str, reason: str) -> Any:
    """Counts a call that is left to torch, and logs the first of each reason."""
    # Under torch.compile this runs once, while compiling.
    if tally.fell_back(reason):
        _log.warning("%s is left to torch: %s", what, reason)
