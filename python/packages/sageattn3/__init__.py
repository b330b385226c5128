"""SageAttention3's function, by the original's name."""

from __future__ import annotations

import logging
from typing import Any, Optional

from sageattention import sageattn
from sageattention._installed import warn_if_shared
from sageattention._keywords import callers_keywords

__all__ = ["sageattn3_blackwell"]

_log = logging.getLogger("sageattention")
_told = False

warn_if_shared(__file__)


@callers_keywords
def sageattn3_blackwell(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    per_block_mean: bool = True,
    *,
    tensor_layout: str = "HND",
    sm_scale: Optional[float] = None,
    return_lse: bool = False,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    **kwargs: Any,
) -> Any:
    """Attention where the original uses FP4 on Blackwell GPUs.

    There are no FP4 kernels here yet. The call is computed as `sageattention.sageattn` would, in 8 and 16 bits: more
    accurate than FP4, on any device, without FP4's speed. A line in the log `sageattention` says so once.

    Args:
        q: `[batch, heads, q_len, head_dim]`, head_dim 1 to 256.
        k: As q, with heads that divide q's, and any length. Never changed, unlike in the original.
        v: As k.
        attn_mask: Bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`.
        is_causal: Whether a query sees no later key; bottom-right where q_len != kv_len.
        per_block_mean: Which mean of Q the original's FP4 quantiser subtracts: of no effect without FP4.
        tensor_layout: Ours, as all that follow and as in `sageattn`: "HND" or "NHD".
        sm_scale: Factor on QKᵀ, above 0; `1 / sqrt(head_dim)` when None.
        return_lse: Whether to return (out, log-sum-exp).
        causal_alignment: "bottom_right" or "top_left".
        window: (left, right); None or -1 is no limit.
        logit_softcap: Soft cap of the scaled scores.

    Returns:
        The output in q's shape and dtype; with `return_lse` a pair of it and float32 `[batch, heads, q_len]`.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.

    Source: `sageattn3_blackwell` of SageAttention3, https://arxiv.org/abs/2505.11594.
    """
    global _told
    if not _told:
        _told = True
        _log.info("sageattn3_blackwell: no FP4 kernels yet, computed in 8 and 16 bits")
    return sageattn(
        q,
        k,
        v,
        tensor_layout,
        is_causal,
        sm_scale,
        return_lse,
        attn_mask,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
    )
