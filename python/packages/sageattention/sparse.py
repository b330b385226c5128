"""Attention over the blocks of the score matrix that are worth computing.

    from sageattention.sparse import Predictor, sparse_attention

    out = sparse_attention(q, k, v, Predictor.sparge_attn(topk=0.5, simthreshd1=-0.1))

A `Predictor` says which blocks those are, from the means of blocks of queries and keys; each of its constructors is a
published system's. Tensors, layouts, masks, devices, keywords and errors are as `sageattention.core` has them.
`sparse_attention_varlen` predicts each of packed sequences by itself. `video_sparse_attn` and
`block_sparse_attn_from_indices` are FastVideo's functions. For maps that are at hand already there is
`spas_sage_attn.block_sparse_sage2_attn_cuda`.
"""

from __future__ import annotations

from typing import Any, Optional

from sageattention import _values
from sageattention._frameworks import predict, sparse, sparse_varlen
from sageattention._keywords import callers_keywords
from sageattention._predictor import Predictor, fields
from sageattention._request import request
from sageattention._video import block_sparse_attn_from_indices, video_sparse_attn

__all__ = [
    "Predictor",
    "block_sparse_attn_from_indices",
    "predict_blocks",
    "sparse_attention",
    "sparse_attention_varlen",
    "video_sparse_attn",
]


@callers_keywords
def sparse_attention(
    q: Any,
    k: Any,
    v: Any,
    predictor: Predictor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: Optional[float] = None,
    return_lse: bool = False,
    attn_mask: Any = None,
    *,
    return_map: bool = False,
    pooled_tail: bool = False,
    smoothing: bool = True,
    scheme: Optional[str] = None,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """Attention of the blocks that a predictor keeps; the others are left out.

    Args:
        q: `[batch, heads, q_len, head_dim]` ("HND") or `[batch, q_len, heads, head_dim]` ("NHD").
        k: As q, with heads that divide q's, and any length.
        v: As k.
        predictor: What predicts the blocks. Of a causal mask and a window it knows; scale, soft cap and `attn_mask` do
            not change what it keeps.
        tensor_layout: "HND" or "NHD".
        is_causal: Whether a query sees no later key.
        sm_scale: Factor on QKᵀ, above 0; `1 / sqrt(head_dim)` when None.
        return_lse: Whether to return the log-sum-exp too, of the scores that were computed and of pooled terms.
        attn_mask: Bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`.
        return_map: Whether to return the map too.
        pooled_tail: Whether each block that is left out counts as one key, with the means of its keys and values and
            the weight of all of them, as in Sol-Attn (arXiv 2607.24027): worth a fifth of the error and more where few
            blocks are kept of a video, and nothing for text. Not with `attn_mask`.
        smoothing: Whether K's mean is subtracted before K is quantised; what the predictor subtracts is its own option.
        scheme: The name of a scheme, in place of the device's choice.
        causal_alignment: "bottom_right" or "top_left": where the diagonal lies when q_len != kv_len.
        window: (left, right): keys further before or after the diagonal are hidden; None or -1 is no limit.
        logit_softcap: Scaled scores s become `softcap * tanh(s / softcap)`; None or 0 leaves them.
        sinks: Attention sinks, float32 `[heads]`, as in `sageattention.sageattn`; they do not change which blocks are
            kept. (First blocks of keys that are kept in any case are a predictor's `sink_k`.)
        kv_lens: Integers `[batch]`: how many keys each entry of the batch has, as in `sageattention.sageattn`. Blocks
            are predicted from these keys alone.

    Returns:
        The output in q's shape and dtype; where asked for, a tuple of it, the log-sum-exp (float32
        `[batch, heads, q_len]`) and the map (bool `[batch, heads, q_blocks, k_blocks]`, True where a block was
        computed). Rows that see no key of a kept block are zeros, with log-sum-exp -inf, or their sink's.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.
    """
    asked = request(
        tensor_layout,
        is_causal,
        sm_scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        scheme=scheme,
        smooth_k=_values.flag("smoothing", smoothing),
        pooled_tail=pooled_tail,
    )
    results = sparse(
        q,
        k,
        v,
        fields(predictor, q, tensor_layout),
        asked,
        attn_mask=attn_mask,
        sinks=sinks,
        kv_lens=kv_lens,
        return_lse=_values.flag("return_lse", return_lse),
        return_map=_values.flag("return_map", return_map),
    )
    return tuple(results) if len(results) > 1 else results[0]


@callers_keywords
def sparse_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    predictor: Predictor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    is_causal: bool = False,
    sm_scale: Optional[float] = None,
    smooth_k: bool = True,
    *,
    return_lse: bool = False,
    scheme: Optional[str] = None,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    **kwargs: Any,
) -> Any:
    """Attention of the blocks that a predictor keeps of packed sequences, each predicted by itself: its blocks begin
    with its first query and key. Nothing waits for a GPU where the longest is given.

    Args:
        q: `[total_q, heads, head_dim]`.
        k: `[total_k, kv_heads, head_dim]`, heads dividing q's.
        v: As k, but maybe of another head_dim.
        predictor: What predicts the blocks, as in `sparse_attention`.
        cu_seqlens_q: int32 or int64 `[sequences + 1]`, and all that follows, as in `sageattention.sageattn_varlen`.
        cu_seqlens_k: Likewise for k and v.
        max_seqlen_q: The longest sequence of q, or more; None finds it.
        max_seqlen_k: Likewise for k and v.
        is_causal: Whether a query sees no later key of its sequence.
        sm_scale: Factor on QKᵀ; `1 / sqrt(head_dim)` when None.
        smooth_k: Whether K's mean over each sequence is subtracted before K is quantised; what the predictor subtracts
            is its own option.
        return_lse: Whether to return (out, float32 `[heads, total_q]`) as well.
        scheme: The name of a scheme, in place of the device's choice.
        causal_alignment: "bottom_right" or "top_left", where the diagonal of each sequence lies.
        window: (left, right), within each sequence.
        logit_softcap: As in `sparse_attention`.
        sinks: As in `sparse_attention`.

    Returns:
        `[total_q, heads, head_dim]`, v's head_dim; with `return_lse` a pair. On a GPU, rows that belong to no sequence
        are not written.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.
    """
    asked = request(
        "HND",
        is_causal,
        sm_scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        scheme=scheme,
        smooth_k=smooth_k,
    )
    lengths = (
        cu_seqlens_q,
        cu_seqlens_k,
        _values.length("max_seqlen_q", max_seqlen_q),
        _values.length("max_seqlen_k", max_seqlen_k),
    )
    found = fields(predictor, q, "HND", packed=True)
    return sparse_varlen(q, k, v, lengths, found, asked, sinks=sinks, return_lse=_values.flag("return_lse", return_lse))


@callers_keywords
def predict_blocks(
    q: Any,
    k: Any,
    predictor: Predictor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    *,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """The blocks that a predictor keeps, without attention over them.

    Args:
        q: `[batch, heads, q_len, head_dim]` ("HND") or `[batch, q_len, heads, head_dim]` ("NHD").
        k: As q, with heads that divide q's, and any length.
        predictor: What predicts the blocks.
        tensor_layout: "HND" or "NHD".
        is_causal: Whether a query sees no later key.
        causal_alignment: "bottom_right" or "top_left".
        window: (left, right), as in `sparse_attention`.
        kv_lens: As in `sparse_attention`.

    Returns:
        Bool `[batch, heads, q_blocks, k_blocks]`, the same as `sparse_attention` returns.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.
    """
    asked = request(tensor_layout, is_causal, None, causal_alignment=causal_alignment, window=window)
    return predict(q, k, fields(predictor, q, tensor_layout), asked, kv_lens)
