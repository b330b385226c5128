"""What torch's tensors bring along: devices, layouts, derivatives, autocast."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.bias import CausalBias, CausalVariant

# Remembered: torch reads all that there is to know of a GPU for it, each time.
_read_capability = functools.lru_cache(maxsize=None)(torch.cuda.get_device_capability)


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """A GPU's compute capability."""
    return _read_capability(device)


def check_tensors(q: Tensor, **others: Any) -> None:
    """Refuses devices that nothing here computes on, tensors that are not where q is, and layouts without strides."""
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"q: device is {q.device}, expected cpu or cuda")
    # Torch's own allocation of the output would only say that CUDA is not initialised.
    if q.device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda._is_in_bad_fork():
        raise RuntimeError(
            f"q: device is {q.device} in a process that was forked from one that had used CUDA, expected cpu: start "
            "processes by the spawn method (multiprocessing.get_context('spawn'))"
        )
    _check_layout("q", q)
    for name, tensor in others.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: type is {type(tensor).__name__}, expected torch.Tensor, as q")
        _check_layout(name, tensor)
        if tensor.device != q.device:
            raise ValueError(f"{name}: device is {tensor.device}, expected {q.device}, as q")


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise TypeError(
            f"{name}: a nested tensor of layout {tensor.layout}, expected a dense one; sageattn_varlen computes "
            "sequences of different lengths, from values() and offsets()"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: layout is {tensor.layout}, expected torch.strided: call to_dense()")


def plain_mask(attn_mask: Any, device: torch.device) -> Any:
    """A mask with numbers: torch's causal biases stand for some and hold none."""
    if not isinstance(attn_mask, CausalBias):
        return attn_mask
    rows, keys = attn_mask.seq_len_q, attn_mask.seq_len_kv
    diagonal = 0 if attn_mask.variant == CausalVariant.UPPER_LEFT else keys - rows
    return torch.ones(rows, keys, dtype=torch.bool, device=device).tril(diagonal)


def refuse_derivatives(**tensors: Optional[Tensor]) -> None:
    """There is no backward pass yet, nor a forward one; one that is silently missing would be worse than none."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise NotImplementedError(
                f"{name}: requires_grad is True, expected False: there is no backward pass yet; "
                "call under torch.no_grad() or torch.inference_mode()"
            )
        if has_tangent(tensor):
            raise NotImplementedError(
                f"{name}: has a tangent, expected none: forward-mode derivatives (torch.func.jvp, dual tensors) are "
                "not computed; torch.nn.functional.scaled_dot_product_attention has them"
            )


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor carries a forward-mode derivative, which `torch.no_grad` does not switch off."""
    # Under torch.compile no tensor has one: it refuses such inputs itself.
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


def autocast_dtype(device: torch.device) -> Optional[torch.dtype]:
    """The dtype that autocast casts to, if it is on for a device: torch's own function is on its list."""
    # The usual answer, for all devices at once: a device's type is a string that is made anew each time.
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    kind = device.type
    if kind not in ("cpu", "cuda"):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Tensors as autocast casts those of torch's own function; without it, as they are."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(_cast(tensor, dtype) for tensor in tensors)


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    # torch leaves double precision alone, and masks of booleans.
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
