"""Hugging Face transformers: an attention implementation with a name."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from sageattention._request import request
from sageattention._torch import dense


def register(name: str) -> None:
    """See `plug_in.register_transformers`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, attention_forward)
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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of `[batch, heads, seq, head_dim]`; the output is `[batch, seq, heads, head_dim]`."""
    if dropout > 0.0:
        raise NotImplementedError(f"dropout: value is {dropout}, expected 0: call model.eval()")
    if s_aux is not None:
        raise NotImplementedError("s_aux: attention sinks are not supported: use another attn_implementation")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # A single query is the newest of its sequence, and sees all keys. A mask holds the causal one already.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if position_bias is not None:
        attention_mask = _biased(position_bias, attention_mask)
    asked = request(
        "NHD",
        causal,
        scaling,
        # transformers leaves its mask out where the first query sees the first key.
        causal_alignment="top_left",
        logit_softcap=softcap,
    )
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return dense(query, key, value, asked, attention_mask, None, False), None


def _biased(position_bias: Tensor, attention_mask: Optional[Tensor]) -> Tensor:
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, float("-inf"))
    return position_bias + attention_mask
