"""Which calls are left to torch's own attention, and why."""

from __future__ import annotations

import functools
import logging
from typing import Any, Optional

import torch
from torch import Tensor

from sageattention import _native
from sageattention._tally import tally
from sageattention._torch_inputs import autocast_dtype, capability, has_tangent

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
    plain: bool,
) -> Optional[str]:
    """Why torch must compute a call of its function, in words that are the same for all such calls. `plain` is what
    `is_plain` says of its tensors."""
    if dropout_p > 0.0:
        return "dropout_p is above 0"
    reason = None if plain else _why_not_tensors(query, key, value, attn_mask)
    return (
        reason
        or _why_not_dtypes(query, key, value)
        or _why_not_shapes(query, key, value, enable_gqa)
        or _why_not_options(query, key, attn_mask, is_causal, scale)
    )


def _why_not_tensors(query: Tensor, key: Tensor, value: Tensor, attn_mask: Optional[Tensor]) -> Optional[str]:
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
    if device.type != "cpu" and (device.type != "cuda" or torch.version.hip is not None):
        return f"tensors are on {device.type}"
    if any(tensor.device != device for tensor in tensors):
        return "tensors are on several devices"
    return None


def _why_not_dtypes(query: Tensor, key: Tensor, value: Tensor) -> Optional[str]:
    on_gpu = query.is_cuda
    dtype, key_dtype, value_dtype = query.dtype, key.dtype, value.dtype
    cast = autocast_dtype(query.device)
    if cast is not None:
        dtype, key_dtype, value_dtype = (
            cast if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor.dtype
            for tensor in (query, key, value)
        )
    if dtype != key_dtype or dtype != value_dtype:
        return "tensors are of several dtypes"
    if dtype not in (torch.float16, torch.bfloat16) and (on_gpu or dtype != torch.float32):
        return f"tensors are {dtype} on {query.device.type}"
    return _why_not_gpu(capability(query.device), dtype) if on_gpu else None


def _why_not_gpu(compute_capability: tuple[int, int], dtype: torch.dtype) -> Optional[str]:
    if compute_capability < (7, 5):
        return "the GPU's compute capability is below 7.5"
    if compute_capability < (8, 0) and dtype == torch.bfloat16:
        return "tensors are torch.bfloat16 on a GPU whose compute capability is below 8.0"
    return None


def _why_not_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Optional[str]:
    q, k, v = query.shape, key.shape, value.shape
    if len(q) not in (3, 4) or not len(q) == len(k) == len(v):
        return "tensors have other than 3 or 4 dimensions"
    if q[-1] != k[-1]:
        return "head_dim is not the same for query and key"
    if not (q[-1] == v[-1] and 1 <= q[-1] <= 256) and not _computes_channels(q[-1], v[-1], query.device):
        return f"heads of so many channels are not computed on {query.device.type}"
    # One batch of keys or values is every one's.
    if k[1:-1] != v[1:-1] or k[0] not in (1, q[0]) or v[0] not in (1, q[0]):
        return "batches or heads are broadcast"
    if len(q) == 4 and q[1] != k[1]:
        if not enable_gqa or k[1] == 0 or q[1] % k[1] != 0:
            return "heads are broadcast"
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        return "a tensor has no element"
    return None


# Remembered: on a GPU a call is planned to know it.
_computed_channels = functools.lru_cache(maxsize=None)(_native.computes_channels)


@torch.compiler.assume_constant_result
def _computes_channels(head_dim: int, value_dim: int, device: torch.device) -> bool:
    """Whether heads of so many channels are computed on a device, of query and key and of value."""
    gpu = None
    if device.type == "cuda":
        gpu = torch.cuda.current_device() if device.index is None else device.index
    return _computed_channels(int(head_dim), int(value_dim), gpu)


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
