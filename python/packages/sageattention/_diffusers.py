"""diffusers: our functions behind the `sage` backends of its attention dispatcher."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Optional

import torch
from torch import Tensor

from sageattention._fallback import fell_back, why_not
from sageattention._operators import is_plain
from sageattention._request import Request
from sageattention._schedule import AnyScheme, check_any_scheme, scheme_now
from sageattention._torch import dense

# Backends of diffusers, and the scheme that each one's name stands for; None is the one that is registered.
_BACKENDS = {
    "sage": None,
    "sage_varlen": None,
    "_sage_qk_int8_pv_fp8_cuda": "sage2pp-int8-fp8-per-thread",
    "_sage_qk_int8_pv_fp8_cuda_sm90": "sage2-int8-fp8-sm90-per-thread",
    "_sage_qk_int8_pv_fp16_cuda": "sage2-int8-fp16-per-thread",
    "_sage_qk_int8_pv_fp16_triton": "sage1-int8-fp16",
}

# The log-sum-exp of a row that sees no key of a ring's part: diffusers' merging makes NaN of -inf before a number. So
# low that the part weighs nothing, and high enough that merged ones keep 10 bits after the point.
_HIDDEN_LSE = -8192.0


def register(scheme: AnyScheme) -> None:
    """See `plug_in.register_diffusers`."""
    from diffusers import __version__ as version
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    check_any_scheme(scheme)
    if "supports_context_parallel" not in inspect.signature(_AttentionBackendRegistry.register).parameters:
        raise ImportError(f"diffusers: version is {version}, expected 0.36 or later")
    for name, named in _BACKENDS.items():
        # Its own checks want a GPU, and heads and types of certain kinds; ours name what is wrong themselves.
        register = _AttentionBackendRegistry.register(
            AttentionBackendName(name), constraints=[], supports_context_parallel=True
        )
        register(_backend(attention_dispatch, name, named or scheme, nearest=named is not None))


def _backend(dispatch: Any, name: str, scheme: AnyScheme, nearest: bool) -> Any:
    """The function behind a name. diffusers passes the arguments that its signature has, and drops all others."""
    native = dispatch.AttentionBackendName.NATIVE
    what = f"diffusers' {name}"

    def backend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Optional[Tensor] = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: Optional[float] = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        _parallel_config: Any = None,
    ) -> Any:
        reason = _why_not(query, key, value, attn_mask, dropout_p, scale, enable_gqa, _parallel_config)
        if reason is not None:
            # diffusers' native backend has no log-sum-exp, and so no rings.
            if return_lse:
                raise NotImplementedError(
                    f"return_lse: value is True, expected False: {what} leaves the call to torch: {reason}"
                )
            if _parallel_config is not None and _parallel_config.context_parallel_config.ring_degree > 1:
                raise NotImplementedError(
                    f"ring_degree: value is {_parallel_config.context_parallel_config.ring_degree}, expected 1: {what} "
                    f"leaves the call to torch: {reason}"
                )
            fell_back(what, reason)
            theirs = dispatch._AttentionBackendRegistry._backends[native]
            return theirs(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, False, _parallel_config
            )
        if attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
            # A mask of keys, as diffusers' native backend reads it.
            attn_mask = attn_mask[:, None, None]
        asked = Request("NHD", is_causal, "top_left", sm_scale=scale, scheme=scheme_now(scheme), nearest=nearest)
        if _parallel_config is None:
            return dense(query, key, value, asked, attn_mask, return_lse=return_lse)
        parallel = _parallel_config.context_parallel_config
        in_ring, in_ulysses = parallel.ring_degree > 1, parallel.ulysses_degree > 1
        parts = None
        if in_ring and attn_mask is not None:
            attn_mask, parts = None, _masks_of_parts(attn_mask, key.shape[1], parallel)
        out = dispatch._templated_context_parallel_attention(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            # diffusers refuses both for all; rings lack the one, and exchanged heads the other.
            is_causal and in_ring,
            scale,
            in_ulysses and query.shape[2] != key.shape[2],
            return_lse,
            forward_op=functools.partial(_forward, asked, parts),
            backward_op=_backward,
            _parallel_config=_parallel_config,
        )
        if return_lse and parts is not None:
            out, lse = out
            return out, lse.masked_fill(lse < _HIDDEN_LSE / 2, float("-inf"))
        return out

    return backend


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor],
    dropout_p: float,
    scale: Optional[float],
    enable_gqa: bool,
    parallel: Any,
) -> Optional[str]:
    """Why diffusers' native backend must compute a call. All processes of a parallel one say the same."""
    plain = is_plain(query, key, value, attn_mask)
    mask = attn_mask
    if mask is not None and (parallel is not None or mask.shape == (query.shape[0], key.shape[1])):
        # Its keys are of another part, or its shape stands for another: dtype and device are what counts.
        mask = mask[..., :1, :1]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    # A mask goes on top of a causal one here, so that both together are no reason.
    return why_not(query, key, value, mask, dropout_p, False, scale, enable_gqa, plain)


def _forward(
    asked: Request,
    parts: Any,
    ctx: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> Any:
    """A step of a ring, or what a process has of the heads. Its log-sum-exp is `[batch, seq, heads]`."""
    if parts is not None:
        attn_mask = next(parts)
    out = dense(query, key, value, asked, attn_mask, return_lse=return_lse)
    if not return_lse:
        return out
    out, lse = out
    if parts is not None:
        lse = lse.masked_fill(torch.isneginf(lse), _HIDDEN_LSE)
    return out, lse.transpose(1, 2)


def _backward(ctx: Any, grad_out: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("grad_out: there is no backward pass yet, expected a call under torch.no_grad()")


def _masks_of_parts(attn_mask: Tensor, kv_len: int, parallel: Any) -> Any:
    """The masks of a ring's parts of keys, in the order in which they come to this process.

    diffusers hands one and the same mask to every step. A mask of this process's keys (last axis `kv_len`) is gathered
    from all of them, one of all keys is cut.
    """
    degree = parallel.ring_degree * parallel.ulysses_degree
    length = attn_mask.shape[-1]
    if length == 1:
        parts = [attn_mask] * parallel.ring_degree
    else:
        if length == kv_len:
            if parallel.ulysses_degree > 1:
                attn_mask = _gathered(attn_mask, parallel._ulysses_mesh)
            attn_mask = _gathered(attn_mask, parallel._ring_mesh)
        if attn_mask.shape[-1] != kv_len * degree:
            raise ValueError(
                f"attn_mask: shape is {list(attn_mask.shape)}, expected a last axis of 1, {kv_len} (keys of this "
                f"process) or {kv_len * degree} (all keys)"
            )
        parts = attn_mask.chunk(parallel.ring_degree, dim=-1)
    own = parallel._ring_local_rank
    return iter([parts[(own + step) % parallel.ring_degree] for step in range(parallel.ring_degree)])


def _gathered(attn_mask: Tensor, mesh: Any) -> Tensor:
    """Every process's keys of a mask, one after the other."""
    group = mesh.get_group()
    masks = [torch.empty_like(attn_mask) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(masks, attn_mask.contiguous(), group=group)
    return torch.cat(masks, dim=-1)
