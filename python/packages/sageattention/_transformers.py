"""Hugging Face transformers: an attention implementation with a name."""

from __future__ import annotations

import functools
import sys
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from sageattention._cached_tensor import CachedTensor
from sageattention._fallback import fell_back, why_not
from sageattention._operators import is_plain
from sageattention._request import check_scheme, request
from sageattention._tally import tally
from sageattention._torch import dense


def register(name: str, scheme: Optional[str]) -> None:
    """See `plug_in.register_transformers`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    check_scheme(scheme)
    AttentionInterface.register(name, functools.partial(attention_forward, scheme=scheme))
    # Boolean masks, left out where a causal mask or none says the same.
    AttentionMaskInterface.register(name, sdpa_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    dropout: float = 0.0,
    scaling: Optional[float] = None,
    is_causal: Optional[bool] = None,
    position_bias: Optional[Tensor] = None,
    softcap: Optional[float] = None,
    s_aux: Optional[Tensor] = None,
    *,
    scheme: Optional[str] = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention of `[batch, heads, seq, head_dim]`; the output is `[batch, seq, heads, head_dim]`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if type(key) is CachedTensor:
        out = _over_cache(
            key, query, attention_mask, bool(causal), dropout, scaling, position_bias, softcap, s_aux, scheme, kwargs
        )
        return out.transpose(1, 2), None
    # A single query is the newest of its sequence, and sees all keys. A mask holds the causal one already.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    mask = attention_mask if position_bias is None else _biased(position_bias, attention_mask)

    if scaling is not None and scaling < 0.0:
        # No kernel takes such a factor, and torch's for the CPU give NaN with a causal mask; q's sign costs nothing.
        query, scaling = -query, -scaling

    # A bias goes on top of a causal mask here, so that only a mask of its own would be a reason.
    plain = is_plain(query, key, value, mask)
    reason = why_not(query, key, value, mask, dropout, False, scaling, enable_gqa=True, plain=plain)
    if reason is None and s_aux is not None and s_aux.requires_grad and torch.is_grad_enabled():
        reason = "a tensor requires its gradient, and there is no backward pass yet"
    if reason is not None:
        options = dict(dropout=dropout, scaling=scaling, is_causal=is_causal, position_bias=position_bias)
        if softcap is not None:
            options["softcap"] = softcap
        if s_aux is not None:
            options["s_aux"] = s_aux
        return _by_transformers(reason, module, query, key, value, attention_mask, causal, options, kwargs)

    asked = request(
        "NHD",
        causal,
        scaling,
        # transformers leaves its mask out where the first query sees the first key.
        causal_alignment="top_left",
        logit_softcap=softcap,
        scheme=scheme,
    )
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return dense(query, key, value, asked, mask, _sinks(s_aux)), None


def _over_cache(
    key: CachedTensor,
    query: Tensor,
    attention_mask: Optional[Tensor],
    causal: bool,
    dropout: float,
    scaling: Optional[float],
    position_bias: Optional[Tensor],
    softcap: Optional[float],
    s_aux: Optional[Tensor],
    scheme: Optional[str],
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention over a quantised cache (`plug_in.transformers_cache`), of `[batch, heads, seq, head_dim]`."""
    if dropout > 0.0:
        raise NotImplementedError(f"dropout: value is {dropout}, expected 0 over a sageattention cache")
    if position_bias is not None:
        raise NotImplementedError("position_bias: a tensor, expected None over a sageattention cache")
    if scheme is not None:
        raise NotImplementedError(
            f"scheme: value is {scheme}, expected None: that of a sageattention cache is what it stores"
        )
    if scaling is not None and scaling < 0.0:
        query, scaling = -query, -scaling
    out = key.layer.attend(
        query,
        attention_mask,
        causal=causal,
        scaling=scaling,
        sliding_window=kwargs.get("sliding_window"),
        softcap=softcap,
        sinks=_sinks(s_aux),
    )
    tally.accelerated()
    return out


def _sinks(s_aux: Optional[Tensor]) -> Optional[Tensor]:
    """Attention sinks, which models have as a parameter in their own dtype."""
    return None if s_aux is None else s_aux.detach().float()


def _biased(position_bias: Tensor, attention_mask: Optional[Tensor]) -> Tensor:
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, float("-inf"))
    return position_bias + attention_mask


def _by_transformers(
    reason: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    causal: bool,
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    """The call by transformers' own functions: "sdpa", or the model's "eager" for what SDPA has no argument for."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # Under `patch` it is counted there.
    if "s_aux" in options or "softcap" in options or F.scaled_dot_product_attention.__module__ != "sageattention._sdpa":
        fell_back("transformers' attention", reason)
    if "s_aux" not in options and "softcap" not in options:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise NotImplementedError(
            f"attn_implementation: {reason}, and {type(module).__module__} has no eager_attention_forward: use another"
        )
    # It adds its mask, and has no other way to know that it is causal.
    if attention_mask is None and causal:
        rows, keys = query.shape[2], key.shape[2]
        attention_mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, hidden)
    return eager(module, query, key, value, attention_mask, **options, **kwargs)
