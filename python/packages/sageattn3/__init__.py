"""SageAttention3's function, by the original's name."""

from __future__ import annotations

import logging
from typing import Any

from sageattention._frameworks import dense
from sageattention._request import check_ignored, request

__all__ = ["sageattn3_blackwell"]

_log = logging.getLogger("sageattention")
_told = False


def sageattn3_blackwell(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    per_block_mean: bool = True,
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

    Returns:
        The output in q's shape and dtype.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `sageattention.core` says.

    Source: `sageattn3_blackwell` of SageAttention3, https://arxiv.org/abs/2505.11594.
    """
    global _told
    check_ignored("sageattn3_blackwell", kwargs)
    if not _told:
        _told = True
        _log.info("sageattn3_blackwell: no FP4 kernels yet, computed in 8 and 16 bits")
    return dense(q, k, v, request("HND", is_causal, None), attn_mask=attn_mask)
