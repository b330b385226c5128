"""torch's registry of flash-attention implementations: ours as one of them, by its own operators."""

from __future__ import annotations

import threading
from typing import Any, Callable, Optional

import torch
from torch import Tensor

from sageattention import _sdpa, _torch
from sageattention._fallback import fell_back, why_not
from sageattention._operators import is_plain
from sageattention._request import Request
from sageattention._schedule import AnyScheme, check_any_scheme, scheme_now

_FORWARD = "_scaled_dot_product_flash_attention"
_PACKED_FORWARD = "_flash_attention_forward"
_BACKWARDS = ("_scaled_dot_product_flash_attention_backward", "_flash_attention_backward")
_WHAT = "torch's flash attention"

# For each device the state of a random generator that our outputs come with: dropout there is none, and a backward pass
# that gets it knows by it who computed its forward pass.
_no_dropout: dict[torch.device, tuple[Tensor, Tensor]] = {}


class _Left(threading.local):
    """Whether the thread is in a call that is left to torch.

    The operators within it are then torch's as well: its function calls the packed one, with tensors that no longer
    show that they require gradients.
    """

    to_torch = False


_left = _Left()


def _leave_to_torch(compute: Callable[[], Any]) -> Any:
    outer, _left.to_torch = _left.to_torch, True
    try:
        return compute()
    finally:
        _left.to_torch = outer


def register(name: str, scheme: AnyScheme) -> None:
    """See `plug_in.register_flash_attention`."""
    check_any_scheme(scheme)
    if not hasattr(torch.nn.attention, "register_flash_attention_impl") or not hasattr(torch.library, "get_kernel"):
        raise NotImplementedError(
            f"torch: version is {torch.__version__}, expected one with torch.nn.attention.register_flash_attention_impl"
        )
    torch.nn.attention.register_flash_attention_impl(name, register_fn=lambda: Active(scheme))


class Active:
    """Our kernels in the dispatcher, until `remove`; torch keeps the handle."""

    def __init__(self, scheme: AnyScheme) -> None:
        self._library: Optional[torch.library.Library] = torch.library.Library("aten", "IMPL", "CUDA")
        for operator, make in (
            (_FORWARD, forward_of),
            (_PACKED_FORWARD, packed_forward_of),
            (_BACKWARDS[0], backward_of),
            (_BACKWARDS[1], backward_of),
        ):
            # Before it is replaced: what is not computed here is torch's own.
            theirs = torch.library.get_kernel(f"aten::{operator}", "CUDA")
            self._library.impl(operator, make(theirs, scheme), "CUDA", with_keyset=True)
        # torch prefers cuDNN on some GPUs, which nobody can stand in for.
        self._cudnn_before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)

    def remove(self) -> None:
        """Puts torch's kernels back."""
        if self._library is not None:
            self._library._destroy()
            self._library = None
            torch.backends.cuda.enable_cudnn_sdp(self._cudnn_before)


def forward_of(theirs: Any, scheme: AnyScheme) -> Any:
    """aten::_scaled_dot_product_flash_attention, of `[batch, heads, seq, head_dim]`."""

    def forward(
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: Optional[float] = None,
    ) -> Any:
        reason = _why_not(query, key, value, dropout_p, scale, return_debug_mask)
        if reason is not None:
            fell_back(_WHAT, reason)
            return _leave_to_torch(
                lambda: theirs.call_boxed(keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)
            )
        out = _sdpa._out_as(query, key, value)
        lse = _torch.lse_like(query, "HND")
        _torch.forward(query, key, value, out, _request("HND", is_causal, scale, scheme), lse=lse)
        state, offset = _random_state(query.device)
        return out, lse, None, None, query.shape[2], key.shape[2], state, offset, query.new_empty(0)

    return forward


def packed_forward_of(theirs: Any, scheme: AnyScheme) -> Any:
    """aten::_flash_attention_forward, of `[batch, seq, heads, head_dim]` or, packed, `[total, heads, head_dim]`."""

    def forward(
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cum_seq_q: Optional[Tensor],
        cum_seq_k: Optional[Tensor],
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: Optional[float] = None,
        window_size_left: Optional[int] = None,
        window_size_right: Optional[int] = None,
        **others: Any,
    ) -> Any:
        left_to_torch = lambda: theirs.call_boxed(
            keys, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
            scale=scale, window_size_left=window_size_left, window_size_right=window_size_right, **others,
        )  # fmt: skip
        if _left.to_torch:
            return left_to_torch()
        packed = cum_seq_q is not None
        q, k, v = (x[None].transpose(1, 2) if packed else x.transpose(1, 2) for x in (query, key, value))
        reason = _why_not(q, k, v, dropout_p, scale, return_debug_mask)
        given = sorted(name for name, value in others.items() if value is not None)
        if given:
            reason = reason or f"{given[0]} is given"
        if reason is None and packed and cum_seq_k is None:
            reason = "cum_seq_k is not given"
        if reason is not None:
            fell_back(_WHAT, reason)
            return left_to_torch()
        left, right = (
            limit if limit is not None and limit >= 0 else None for limit in (window_size_left, window_size_right)
        )
        asked = _request("HND" if packed else "NHD", is_causal, scale, scheme, left, right)
        out = _torch.out_like(query, key, value)
        if packed:
            lse = torch.empty((query.shape[1], query.shape[0]), dtype=torch.float32, device=query.device)
            cu_seqlens = (cum_seq_q, cum_seq_k, int(max_q), int(max_k))
            _torch.forward(query, key, value, out, asked, lse=lse, cu_seqlens=cu_seqlens)
        else:
            lse = _torch.lse_like(query, "NHD")
            _torch.forward(query, key, value, out, asked, lse=lse)
        return out, lse, *_random_state(query.device), query.new_empty(0)

    return forward


def backward_of(theirs: Any, scheme: AnyScheme) -> Any:
    """torch's backward passes, which must not follow our forward pass: its output is another than they take it for."""

    def backward(keys: Any, grad_out: Tensor, *args: Any, **options: Any) -> Any:
        ours = _no_dropout.get(grad_out.device)
        # Both operators have the generator's state last but one.
        state = args[-2] if len(args) >= 2 else None
        if ours is not None and isinstance(state, Tensor) and state.data_ptr() == ours[0].data_ptr():
            raise NotImplementedError(
                "grad_out: the forward pass was computed in 8 bits, expected torch's own: there is no backward pass "
                "yet; call torch.nn.attention.restore_flash_attention_impl() before training"
            )
        return theirs.call_boxed(keys, grad_out, *args, **options)

    return backward


def _why_not(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, scale: Optional[float], return_debug_mask: bool
) -> Optional[str]:
    if return_debug_mask:
        return "return_debug_mask is True"
    plain = is_plain(query, key, value)
    return why_not(query, key, value, None, dropout_p, False, scale, enable_gqa=True, plain=plain)


def _request(
    layout: str,
    is_causal: bool,
    scale: Optional[float],
    scheme: AnyScheme,
    left: Optional[int] = None,
    right: Optional[int] = None,
) -> Request:
    return Request(
        layout, bool(is_causal), window_left=left, window_right=right, sm_scale=scale, scheme=scheme_now(scheme)
    )


def _random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    if device not in _no_dropout:
        state = torch.zeros(2, dtype=torch.uint64, device=device)
        _no_dropout[device] = (state, torch.zeros((), dtype=torch.uint64, device=device))
    return _no_dropout[device]
