"""The function of Sparse_SageAttention_API, by the original's name."""

from __future__ import annotations

from typing import Any, Optional

from sageattention import _values
from sageattention._block_maps import given_map
from sageattention._frameworks import dense
from sageattention._keywords import callers_keywords
from sageattention._request import request
from sageattention._sparge_schemes import scheme_on

__all__ = ["sparse_sageattn"]


@callers_keywords
def sparse_sageattn(
    q: Any,
    k: Any,
    v: Any,
    mask_id: Any = None,
    is_causal: bool = False,
    tensor_layout: str = "HND",
    *,
    sm_scale: Optional[float] = None,
    return_lse: bool = False,
    smooth_k: bool = True,
    causal_alignment: str = "top_left",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    attn_mask: Any = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """Attention of the blocks that a map names, with SageAttention1's arithmetic: INT8 QKᵀ, values in 16 bits.

    Args:
        q: `[batch, heads, q_len, head_dim]` ("HND") or `[batch, q_len, heads, head_dim]` ("NHD").
        k: As q, with heads that divide q's, and any length.
        v: As k.
        mask_id: `[batch, heads, ceil(q_len / 128), ceil(kv_len / 64)]` of q's library, not 0 where a block of 128
            queries and 64 keys is computed; None is all.
        is_causal: Whether a query sees no later key; aligned top-left, as in the original.
        tensor_layout: "HND" or "NHD".
        sm_scale: Ours, as all that follow and as in `sageattention.sageattn`: factor on QKᵀ.
        return_lse: Whether to return (out, log-sum-exp).
        smooth_k: Whether K's mean is subtracted before quantising.
        causal_alignment: "bottom_right" or "top_left".
        window: (left, right); None or -1 is no limit.
        logit_softcap: Soft cap of the scaled scores.
        attn_mask: Bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`.
        sinks: Attention sinks, float32 `[heads]`: for each query head a logit that joins the softmax's denominator and
            has no value.
        kv_lens: Integers `[batch]`: how many keys each entry of the batch has, the first ones of k and v.

    Returns:
        The output in q's shape and dtype, zeros in rows without a block; with `return_lse` a pair of it and float32
        `[batch, heads, q_len]`.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.

    Source: the function of that name of Sparse_SageAttention_API, https://arxiv.org/abs/2410.02367.
    """
    asked = request(
        tensor_layout,
        is_causal,
        sm_scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        scheme=scheme_on(q, "sparge-int8-fp16-triton"),
        nearest=True,
        smooth_k=smooth_k,
    )
    blocks = None if mask_id is None else given_map(q, k, mask_id, tensor_layout, [(128, 64)])
    return_lse = _values.flag("return_lse", return_lse)
    return dense(
        q, k, v, asked, attn_mask=attn_mask, sinks=sinks, kv_lens=kv_lens, block_mask=blocks, return_lse=return_lse
    )
