"""A stand-in for `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias
from torch.overrides import handle_torch_function, has_torch_function

from sageattention import _flops, _torch
from sageattention._fallback import fell_back, why_not
from sageattention._operators import define_operator, is_plain
from sageattention._request import Request
from sageattention._schedule import AnyScheme, check_any_scheme, scheme_now
from sageattention._torch_inputs import autocast

_NAME = "scaled_dot_product_attention"
# Before, torch.compile cannot ask for them.
_MODES_ARE_TRACED = _torch.version_is_at_least(2, 6)
torch_sdpa = F.scaled_dot_product_attention
_scheme: AnyScheme = None
# Whether torch's multi-head attention took its fast path before; None while torch's function is in place.
_fast_path_before: Optional[bool] = None


class State(NamedTuple):
    """What is in place."""

    function: Any
    scheme: AnyScheme
    fast_path_before: Optional[bool]
    fast_path: bool


def patch(scheme: AnyScheme) -> None:
    """See `plug_in.patch`."""
    global _scheme, _fast_path_before
    check_any_scheme(scheme)
    _scheme = scheme
    if _fast_path_before is None:
        _fast_path_before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = scaled_dot_product_attention


def unpatch() -> None:
    """See `plug_in.unpatch`."""
    if _fast_path_before is not None:
        restore(State(torch_sdpa, None, None, _fast_path_before))


def state() -> State:
    """What is in place."""
    return State(F.scaled_dot_product_attention, _scheme, _fast_path_before, torch.backends.mha.get_fastpath_enabled())


def restore(before: State) -> None:
    """Puts back what was in place."""
    global _scheme, _fast_path_before
    F.scaled_dot_product_attention, _scheme, _fast_path_before, fast_path = before
    torch.backends.mha.set_fastpath_enabled(fast_path)


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
    tensors = (query, key, value, attn_mask)
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if enable_gqa:
        # torch 2.4 does not have it.
        options["enable_gqa"] = enable_gqa
    plain = is_plain(*tensors)
    reason = None
    if has_torch_function(tensors) or _a_traced_mode_is_on():
        # As torch's functions begin: subclasses and modes see the call first, by the name that they look it up by.
        # Nested tensors know torch's own function, and while that is in place it is the one to call.
        if any(isinstance(tensor, Tensor) and tensor.is_nested for tensor in (query, key, value)):
            reason = "a tensor is not strided"
        elif F.scaled_dot_product_attention is not scaled_dot_product_attention:
            reason = "torch's function is in place"
        else:
            relevant = tuple(tensor for tensor in tensors if tensor is not None)
            return handle_torch_function(
                scaled_dot_product_attention, relevant, query, key, value, attn_mask=attn_mask, **options
            )
    elif not plain and not (
        all(isinstance(tensor, Tensor) for tensor in (query, key, value))
        and (attn_mask is None or isinstance(attn_mask, Tensor))
    ):
        # torch says what is wrong with them.
        return torch_sdpa(query, key, value, attn_mask=attn_mask, **options)
    if reason is None and _backends_are_selected():
        reason = "backends of torch's own are selected (sdpa_kernel, or torch.backends.cuda.enable_..._sdp)"
    reason = reason or why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, plain)
    if reason is not None:
        fell_back(_NAME, reason)
        return torch_sdpa(query, key, value, attn_mask=attn_mask, **options)
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    if scale is not None and not isinstance(scale, (float, torch.SymFloat)):
        scale = float(scale)
    call = _sdpa_op.compute if plain else _sdpa_op.overload
    scheme = scheme_now(_scheme)
    if query.ndim == 3:
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unsqueeze(1)
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        return call(query, key, value, attn_mask, is_causal, scale, scheme).squeeze(1)
    return call(query, key, value, attn_mask, is_causal, scale, scheme)


def _a_traced_mode_is_on() -> bool:
    """Whether a `TorchFunctionMode` is on, which has_torch_function does not see while a graph is compiled."""
    return _MODES_ARE_TRACED and torch._C._is_torch_function_mode_enabled()


@torch.compiler.assume_constant_result
def _backends_are_selected() -> bool:
    """Whether the user has switched some of torch's kernels off. cuDNN's does not count: it is off on many machines."""
    # Under torch.compile this is asked while compiling, as torch asks for its own function.
    backends = torch.backends.cuda
    return not (backends.flash_sdp_enabled() and backends.mem_efficient_sdp_enabled() and backends.math_sdp_enabled())


def _sdpa(query, key, value, attn_mask, is_causal, scale, scheme):
    out = _out_as(query, key, value)
    request = Request(is_causal=bool(is_causal), causal_alignment="top_left", sm_scale=scale, scheme=scheme)
    _torch.forward(query, key, value, out, request, attn_mask=attn_mask)
    return out


def _out_as(query, key, value, *_):
    # As q's heads lie in memory: for `[batch, seq, heads, head_dim]` seen as heads first, joining heads copies nothing.
    if value.shape[-1] != query.shape[-1]:
        batch, heads, rows, channels = query.shape[:-1] + value.shape[-1:]
        if query.stride(1) < query.stride(2):
            return query.new_empty((batch, rows, heads, channels)).transpose(1, 2)
        return query.new_empty((batch, heads, rows, channels))
    out = torch.empty_like(query)
    if out.stride(-1) == 1:
        return out
    # Where q's channels are no neighbours, the output's are all the same.
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_sdpa_op = define_operator(
    "sdpa",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, bool is_causal, float? scale, str? scheme) -> Tensor",
    _sdpa,
    _out_as,
)


def _script_as_torch() -> None:
    """torch.jit.script compiles what it finds in Python; in the stand-in's place it takes torch's own operator."""
    try:
        from torch.jit._builtins import _register_builtin
    except ImportError:
        return
    _register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")


_script_as_torch()


def _biases_know_both_functions() -> None:
    """torch's causal biases look whether the function that got them is the one in place, and hold no numbers otherwise.

    A module that imported torch's function before `patch` would get garbage with one. (What torch.compile makes of such
    a call is out of reach here: it does not ask the class.)
    """
    theirs = CausalBias.__dict__["__torch_function__"].__func__

    def torch_function(cls, func, types, args=(), kwargs=None):
        if func is torch_sdpa:
            return cls._dispatch(*args, **(kwargs or {}))
        return theirs(cls, func, types, args, kwargs)

    CausalBias.__torch_function__ = classmethod(torch_function)


_biases_know_both_functions()
_flops.register_sdpa()
