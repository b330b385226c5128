"""SageAttention3's functions, by the originals' names: attention in FP4 on Blackwell GPUs.

FP4 is computed on GPUs of compute capability 12 (RTX 50, RTX PRO Blackwell, DGX Spark) and, where `fp4=True` asks for
it, on the CPU, which computes the same formats with the same rounding: whoever wants to know what FP4 does to a model
needs no such GPU. Elsewhere a call is computed as `sageattention.sageattn` would, in 8 and 16 bits, which is more
accurate; a line in the log `sageattention` says so once.
"""

from __future__ import annotations

import logging
from typing import Any, Optional

from sageattention import _values, sageattn
from sageattention._frameworks import major_capability
from sageattention._keywords import callers_keywords

__all__ = ["sageattn3_blackwell", "sageattn_blackwell"]

_log = logging.getLogger("sageattention")
_told = False

# By whether Q's mean is of each block of 128 rows, and whether P is scaled by its groups alone.
_SCHEMES = {
    (True, False): "sage3-nvfp4",
    (False, False): "sage3-nvfp4-sequence-mean",
    (True, True): "sage3-nvfp4-one-level",
    (False, True): "sage3-nvfp4-one-level-sequence-mean",
}


@callers_keywords
def sageattn3_blackwell(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    per_block_mean: bool = True,
    *,
    single_level_p_quant: bool = False,
    fp4: Optional[bool] = None,
    tensor_layout: str = "HND",
    sm_scale: Optional[float] = None,
    return_lse: bool = False,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """Attention in NVFP4: Q, K, V and P are E2M1 with an E4M3 scale for each 16 neighbours.

    Args:
        q: `[batch, heads, q_len, head_dim]`, head_dim 1 to 256.
        k: As q, with heads that divide q's, and any length. Never changed, unlike in the original.
        v: As k.
        attn_mask: Bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`.
        is_causal: Whether a query sees no later key; bottom-right where q_len != kv_len.
        per_block_mean: Whether the mean that is taken from Q is of each block of 128 rows, or of the whole sequence.
        single_level_p_quant: Whether P is scaled by its groups alone, which is less accurate than the paper's two
            levels; Attn-QAT's name of it.
        fp4: Ours: None computes in FP4 on GPUs that have it, and elsewhere in 8 and 16 bits; True computes in FP4 or
            raises NotImplementedError; False never does. On the CPU True is slower than None.
        tensor_layout: Ours, as all that follow and as in `sageattn`: "HND" or "NHD".
        sm_scale: Factor on QKᵀ, above 0; `1 / sqrt(head_dim)` when None.
        return_lse: Whether to return (out, log-sum-exp).
        causal_alignment: "bottom_right" or "top_left".
        window: (left, right); None or -1 is no limit.
        logit_softcap: Soft cap of the scaled scores.
        sinks: Attention sinks, float32 `[heads]`.
        kv_lens: Integers `[batch]`: how many keys each entry of the batch has.

    Returns:
        The output in q's shape and dtype; with `return_lse` a pair of it and float32 `[batch, heads, q_len]`.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.

    Source: `sageattn3_blackwell` of SageAttention3, https://arxiv.org/abs/2505.11594.
    """
    mean = _values.flag("per_block_mean", per_block_mean)
    one_level = _values.flag("single_level_p_quant", single_level_p_quant)
    return sageattn(
        q,
        k,
        v,
        tensor_layout,
        is_causal,
        sm_scale,
        return_lse,
        attn_mask,
        scheme=_scheme("sageattn3_blackwell", q, fp4, _SCHEMES[mean, one_level]),
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        sinks=sinks,
        kv_lens=kv_lens,
    )


@callers_keywords
def sageattn_blackwell(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    per_block_mean: bool = True,
    single_level_p_quant: bool = True,
    sm_scale: Optional[float] = None,
    *,
    fp4: Optional[bool] = None,
    tensor_layout: str = "HND",
    return_lse: bool = False,
    causal_alignment: str = "bottom_right",
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """Attention in NVFP4 for models that were trained with it: nothing is smoothed, P is scaled by its groups alone.

    Args:
        q: `[batch, heads, q_len, head_dim]`, head_dim 1 to 256.
        k: As q, with heads that divide q's, and any length. Never changed.
        v: As k.
        attn_mask: Bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`.
        is_causal: Whether a query sees no later key; bottom-right where q_len != kv_len.
        per_block_mean: Of no effect, as no mean is taken.
        single_level_p_quant: True. False, P in two levels without smoothing, raises NotImplementedError:
            `sageattn3_blackwell` has two levels.
        sm_scale: Factor on QKᵀ, above 0; `1 / sqrt(head_dim)` when None.
        fp4: As in `sageattn3_blackwell`.
        tensor_layout: "HND" or "NHD".
        return_lse: Whether to return (out, log-sum-exp).
        causal_alignment: "bottom_right" or "top_left".
        sinks: Attention sinks, float32 `[heads]`, as in `sageattention.sageattn`.
        kv_lens: Integers `[batch]`: how many keys each entry of the batch has, likewise.

    Returns:
        The output in q's shape and dtype; with `return_lse` a pair of it and float32 `[batch, heads, q_len]`.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.

    Source: `sageattn_blackwell` of Attn-QAT.
    """
    _values.flag("per_block_mean", per_block_mean)
    if not _values.flag("single_level_p_quant", single_level_p_quant):
        raise NotImplementedError(
            "single_level_p_quant: value is False, expected True: sageattn3_blackwell has P in two levels"
        )
    return sageattn(
        q,
        k,
        v,
        tensor_layout,
        is_causal,
        sm_scale,
        return_lse,
        attn_mask,
        scheme=_scheme("sageattn_blackwell", q, fp4, "attn-qat-nvfp4"),
        causal_alignment=causal_alignment,
        sinks=sinks,
        kv_lens=kv_lens,
    )


def _scheme(function: str, q: Any, fp4: Optional[bool], scheme: str) -> Optional[str]:
    """The scheme of a call: `scheme`, which is of FP4, or None for the device's own choice."""
    global _told
    if fp4 is not None:
        return scheme if _values.flag("fp4", fp4) else None
    if major_capability(q) == 12:
        return scheme
    if not _told:
        _told = True
        _log.info("%s: no FP4 where the tensors lie, computed in 8 and 16 bits", function)
    return None
