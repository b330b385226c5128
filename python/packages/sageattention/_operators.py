"""Operators of torch, and when a call need not go through one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import _profiler_enabled, forward_ad

# The registrations live as long as this object.
_LIBRARY = torch.library.Library("sageattention", "DEF")


class Operator(NamedTuple):
    """An operator of torch, and the function behind it, which takes the same arguments."""

    overload: Callable[..., Any]
    compute: Callable[..., Any]


def define_operator(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Operator:
    """An operator with what it computes, and what shapes it gives without computing."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, compute, device)
    torch.library.register_fake(f"sageattention::{name}", fake, lib=_LIBRARY)
    return Operator(getattr(torch.ops.sageattention, name).default, compute)


def is_plain(q: Any, *others: Any) -> bool:
    """Whether a call is one of torch's dense tensors in the memory of one device, and of nothing more: then what an
    operator computes can be called without it. Its way through torch's dispatcher takes longer than the call's own, and
    is for those that see operators there: compilers, transforms, modes, subclasses, derivatives, traces, profilers.

    A None among the others is passed over.
    """
    if (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or _profiler_enabled()
        or type(q) is not Tensor
    ):
        return False
    device = q.device
    for tensor in (q, *others):
        if tensor is not None and (
            type(tensor) is not Tensor
            or tensor.device != device
            or tensor.requires_grad
            or tensor.layout is not torch.strided
            or tensor.is_nested
            # Views whose memory holds other numbers than they do.
            or tensor.is_neg()
            or tensor._is_zerotensor()
        ):
            return False
    return q.is_cpu or (q.is_cuda and torch.version.hip is None and not torch.cuda._is_in_bad_fork())
