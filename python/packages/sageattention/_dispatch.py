"""Operators of torch, called past its dispatcher where nothing of torch's looks on.

An operator is what compilers, graphs, modes and profilers see. To find out that nobody does takes torch's dispatcher
some 18 µs of a call, most of a warm call's time on the host, and this module about one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# What tells that somebody looks on. They are torch's own, and where a version lacks one, every call is dispatched.
try:
    _dispatch_modes = torch._C._len_torch_dispatch_stack
    _transform = torch._C._functorch.peek_interpreter_stack
    _function_mode_is_on = torch._C._is_torch_function_mode_enabled
    _trace = torch._C._get_tracing_state
    _profiler_is_on = torch.autograd._profiler_enabled
    _known = True
except AttributeError:
    _known = False

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def direct_where_unobserved(operator: Any, compute: Callable[..., Any]) -> Callable[..., Any]:
    """A call of `operator`, or of what computes it."""

    def call(*arguments: Any) -> Any:
        # First, as torch.compile does not follow the others.
        if torch.compiler.is_compiling() or not _is_unobserved(arguments):
            return operator(*arguments)
        return compute(*arguments)

    # For who looks for it.
    call.operator = operator  # type: ignore[attr-defined]
    return call


def _is_unobserved(arguments: tuple[Any, ...]) -> bool:
    """Whether no mode, transform, trace or profiler is on, and tensors are plain."""
    if not _known or _dispatch_modes() or _function_mode_is_on() or _profiler_is_on():
        return False
    if _transform() is not None or _trace() is not None:
        return False
    for argument in arguments:
        if isinstance(argument, Tensor) and not _is_plain(argument):
            return False
    return True


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's elements are what lies in its memory."""
    return (
        type(tensor) in _PLAIN
        and tensor.device.type != "meta"
        # The dispatcher resolves both before a kernel sees them.
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )
