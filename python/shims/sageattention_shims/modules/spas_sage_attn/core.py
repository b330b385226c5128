"""SpargeAttn's functions: attention over blocks that are predicted, or that a map names.

Common to those that predict (`..._meansim_...`):

**Which blocks** are computed is decided from the means of blocks of 128 queries and 64 keys (64 and 128 on GPUs of
compute capability 9): each block of queries keeps the key blocks that have together the share `cdfthreshd` of the
weight, or the share `topk` of all key blocks. A block whose tokens are not alike (a self-similarity of at most
`simthreshd1`) is computed with all others. The prediction scales by `1 / sqrt(head_dim)` whatever `scale` says, as the
original's does; a last block that is not full is judged by the tokens that it has, where the original computes it with
all others.

**Thresholds** are one number, or one for each query head: a list, or a tensor, which is read to the host. On a GPU that
waits for it; a `sageattention.sparse.Predictor` reads such a tensor once.

**`pvthreshd`** lets the original skip products with probabilities below `2 ** -pvthreshd`. Here every block of the map
is computed, which is exact; a value below 20, which would matter, is warned of once.

**Causal masks** hide single keys, aligned top-left as the original's blocks are.

Tensors, dtypes, devices, autocast, keywords and errors are as `sageattention.core` has them: any length and a head_dim
of 1 to 256, where the original asks for 128 queries and a head_dim of 64 or 128; grouped-query attention.
"""

from __future__ import annotations

import warnings
from typing import Any, Optional

from sageattention import _values
from sageattention._block_maps import given_map, sparsity
from sageattention._frameworks import dense, is_compiling, major_capability, sparse
from sageattention._keywords import callers_keywords
from sageattention._predictor import Predictor, fields, per_head
from sageattention._request import Request, request
from sageattention._sparge_schemes import scheme_on

# Queries and keys of a block: on GPUs of compute capability 9, and elsewhere.
_HOPPER, _ELSEWHERE = (64, 128), (128, 64)

# With values in FP8, and in 16 bits.
_SAGE2, _SAGE1 = "sparge-int8-fp8", "sparge-int8-fp16"

# Probabilities below 2 ** -20 are less than what 8 bits lose.
_SMALL_PVTHRESHD = 20
_warned_of_pvthreshd = False


@callers_keywords
def spas_sage2_attn_meansim_cuda(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    smooth_k: bool = True,
    simthreshd1: Any = 0.6,
    cdfthreshd: Any = 0.98,
    pvthreshd: Any = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: Any = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """Attention over the blocks that have together the share `cdfthreshd` of the weight; values in FP8.

    Args:
        q: `[batch, heads, q_len, head_dim]` ("HND") or `[batch, q_len, heads, head_dim]` ("NHD").
        k: As q, with heads that divide q's, and any length.
        v: As k.
        attn_mask: Bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`; the original ignores it. It does
            not change which blocks are kept.
        dropout_p: Must be 0.
        is_causal: Whether a query sees no later key.
        scale: Factor on QKᵀ; `1 / sqrt(head_dim)` when None.
        smooth_k: Whether K's mean is subtracted, in the prediction and before quantising.
        simthreshd1: The self-similarity that a block must exceed for its mean to stand for it.
        cdfthreshd: The share of the weight that is kept, 0 to 1.
        pvthreshd: Of no effect: see this module.
        attention_sink: Whether the first keys' blocks are computed in any case.
        tensor_layout: "HND" or "NHD".
        output_dtype: A dtype to convert to; q's when None.
        return_sparsity: Whether to return the share of blocks left out as well, of those that a causal mask shows.
            Waits for the device.
        return_lse: Whether to return float32 `[batch, heads, q_len]` as well, before the sparsity.
        causal_alignment: Ours, as all that follow and as in `sageattention.sageattn`: "bottom_right" or "top_left".
        window: (left, right); None or -1 is no limit.
        logit_softcap: Soft cap of the scaled scores.
        sinks: Attention sinks, float32 `[heads]`: for each query head a logit that joins the softmax's denominator and
            has no value, as in `sageattention.sageattn`. Not `attention_sink`, which keeps blocks.
        kv_lens: Integers `[batch]`: how many keys each entry of the batch has, as in `sageattention.sageattn`. Blocks
            are predicted from these keys alone.

    Returns:
        The output in q's shape; where asked for, a tuple of it, the log-sum-exp and the sparsity.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.

    Source: the function of that name of SpargeAttn, https://arxiv.org/abs/2502.18137.
    """
    predictor = Predictor.sparge_attn(simthreshd1=simthreshd1, cdfthreshd=cdfthreshd)
    asked = _request(
        q, _SAGE2, tensor_layout, is_causal, scale, smooth_k, causal_alignment, window, logit_softcap, dropout_p
    )
    _check_pvthreshd(pvthreshd)
    return predicted(
        q, k, v, predictor, asked, attn_mask, attention_sink, output_dtype, return_sparsity, return_lse, sinks, kv_lens
    )


@callers_keywords
def spas_sage2_attn_meansim_topk_cuda(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    smooth_k: bool = True,
    simthreshd1: Any = -0.1,
    cdfthreshd: Any = None,
    topk: Any = 0.5,
    pvthreshd: Any = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: Any = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """Attention over the share `topk` of the key blocks, those that score highest; values in FP8.

    Exactly one of `topk` (0 to 1) and `cdfthreshd` is a number. The rest as `spas_sage2_attn_meansim_cuda`.

    Source: the function of that name of SpargeAttn, https://arxiv.org/abs/2502.18137.
    """
    predictor = Predictor.sparge_attn(simthreshd1=simthreshd1, topk=topk, cdfthreshd=cdfthreshd)
    asked = _request(
        q, _SAGE2, tensor_layout, is_causal, scale, smooth_k, causal_alignment, window, logit_softcap, dropout_p
    )
    _check_pvthreshd(pvthreshd)
    return predicted(
        q, k, v, predictor, asked, attn_mask, attention_sink, output_dtype, return_sparsity, return_lse, sinks, kv_lens
    )


@callers_keywords
def spas_sage_attn_meansim_cuda(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    smooth_k: bool = True,
    simthreshd1: Any = 0.6,
    cdfthreshd: Any = 0.98,
    pvthreshd: Any = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: Any = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """As `spas_sage2_attn_meansim_cuda`, with values in 16 bits.

    Source: the function of that name of SpargeAttn, https://arxiv.org/abs/2502.18137.
    """
    predictor = Predictor.sparge_attn(simthreshd1=simthreshd1, cdfthreshd=cdfthreshd)
    asked = _request(
        q, _SAGE1, tensor_layout, is_causal, scale, smooth_k, causal_alignment, window, logit_softcap, dropout_p
    )
    _check_pvthreshd(pvthreshd)
    return predicted(
        q, k, v, predictor, asked, attn_mask, attention_sink, output_dtype, return_sparsity, return_lse, sinks, kv_lens
    )


@callers_keywords
def spas_sage_attn_meansim_topk_cuda(
    q: Any,
    k: Any,
    v: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
    smooth_k: bool = True,
    simthreshd1: Any = -0.1,
    cdfthreshd: Any = None,
    topk: Any = 0.5,
    pvthreshd: Any = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: Any = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
    *,
    causal_alignment: str = "top_left",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """As `spas_sage2_attn_meansim_topk_cuda`, with values in 16 bits.

    Source: the function of that name of SpargeAttn, https://arxiv.org/abs/2502.18137.
    """
    predictor = Predictor.sparge_attn(simthreshd1=simthreshd1, topk=topk, cdfthreshd=cdfthreshd)
    asked = _request(
        q, _SAGE1, tensor_layout, is_causal, scale, smooth_k, causal_alignment, window, logit_softcap, dropout_p
    )
    _check_pvthreshd(pvthreshd)
    return predicted(
        q, k, v, predictor, asked, attn_mask, attention_sink, output_dtype, return_sparsity, return_lse, sinks, kv_lens
    )


@callers_keywords
def block_sparse_sage2_attn_cuda(
    q: Any,
    k: Any,
    v: Any,
    mask_id: Any = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    smooth_k: bool = True,
    pvthreshd: Any = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: Any = None,
    return_sparsity: bool = False,
    return_lse: bool = False,
    *,
    is_causal: bool = False,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    attn_mask: Any = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """Attention of the blocks that a map names; the others are left out.

    Args:
        q: `[batch, heads, q_len, head_dim]` ("HND") or `[batch, q_len, heads, head_dim]` ("NHD").
        k: As q, with heads that divide q's, and any length.
        v: As k.
        mask_id: `[batch, heads, ceil(q_len / 128), ceil(kv_len / 64)]`, or of 64 queries and 128 keys as the original's
            callers have it on Hopper: decided by shape, and by the device's architecture where both fit. Not 0 where
            the block is computed; None is all. Tokens of blocks that are left out still enter means and scales.
        dropout_p: Must be 0.
        scale: Factor on QKᵀ; `1 / sqrt(head_dim)` when None.
        smooth_k: Whether K's mean is subtracted before quantising.
        pvthreshd: Of no effect: see this module.
        attention_sink: Whether the first keys' blocks are computed whatever the map says.
        tensor_layout: "HND" or "NHD".
        output_dtype: A dtype to convert to; q's when None.
        return_sparsity: Whether to return the share of blocks left out as well. Waits for the device.
        return_lse: Whether to return float32 `[batch, heads, q_len]` as well, before the sparsity.
        is_causal: Ours, as all that follow and as in `sageattention.sageattn`: whether a query sees no later key.
        causal_alignment: "bottom_right" or "top_left".
        window: (left, right); None or -1 is no limit.
        logit_softcap: Soft cap of the scaled scores.
        attn_mask: Bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`.
        sinks: Attention sinks, float32 `[heads]`, as in `spas_sage2_attn_meansim_cuda`.
        kv_lens: Integers `[batch]`: how many keys each entry of the batch has, likewise.

    Returns:
        The output in q's shape; where asked for, a tuple of it, the log-sum-exp and the sparsity. Rows without a block
        are zeros.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.

    Source: the function of that name of SpargeAttn, https://arxiv.org/abs/2502.18137.
    """
    asked = _request(
        q, _SAGE2, tensor_layout, is_causal, scale, smooth_k, causal_alignment, window, logit_softcap, dropout_p
    )
    _check_pvthreshd(pvthreshd)
    return_lse = _values.flag("return_lse", return_lse)
    block_mask = None
    if mask_id is not None:
        sizes = (_HOPPER, _ELSEWHERE) if major_capability(q) == 9 else (_ELSEWHERE, _HOPPER)
        block_mask = given_map(q, k, mask_id, tensor_layout, sizes)
        if _values.flag("attention_sink", attention_sink):
            block_mask[0][..., 0] = True
    result = dense(
        q, k, v, asked, attn_mask=attn_mask, sinks=sinks, kv_lens=kv_lens, block_mask=block_mask, return_lse=return_lse
    )
    out, *rest = result if return_lse else (result,)
    others: list[Any] = rest
    if _values.flag("return_sparsity", return_sparsity):
        # Of all blocks: a map may name some that a causal mask hides.
        everything = asked._replace(is_causal=False, window_left=None, window_right=None)
        others.append(0.0 if block_mask is None else _sparsity(q, k, *block_mask, everything))
    return _results(out, others, output_dtype)


def predicted(
    q: Any,
    k: Any,
    v: Any,
    predictor: Predictor,
    asked: Request,
    attn_mask: Any,
    attention_sink: bool,
    output_dtype: Any,
    return_sparsity: bool,
    return_lse: bool,
    sinks: Any = None,
    kv_lens: Any = None,
) -> Any:
    """Attention over the blocks that a predictor of the original's blocks keeps."""
    options: dict[str, Any] = {"smooth_k": asked.smooth_k}
    if major_capability(q) == 9:
        options["block_q"], options["block_k"] = _HOPPER
    if _values.flag("attention_sink", attention_sink):
        options["sink_k"] = (0, 1)
    predictor = predictor.replace(**options)
    return_sparsity = _values.flag("return_sparsity", return_sparsity)
    out, *others = sparse(
        q,
        k,
        v,
        fields(predictor, q, asked.tensor_layout),
        asked,
        attn_mask=attn_mask,
        sinks=sinks,
        kv_lens=kv_lens,
        return_lse=_values.flag("return_lse", return_lse),
        return_map=return_sparsity,
    )
    if return_sparsity:
        others[-1] = _sparsity(q, k, others[-1], predictor.block_q, predictor.block_k, asked, kv_lens)
    return _results(out, others, output_dtype)


def _request(
    q: Any,
    scheme: str,
    tensor_layout: Any,
    is_causal: Any,
    scale: Any,
    smooth_k: Any,
    causal_alignment: Any,
    window: Any,
    logit_softcap: Any,
    dropout_p: Any,
) -> Request:
    if _values.number("dropout_p", dropout_p):
        raise NotImplementedError(f"dropout_p: value is {dropout_p}, expected 0: dropout is not computed")
    return request(
        tensor_layout,
        is_causal,
        scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        scheme=scheme_on(q, scheme),
        nearest=True,
        smooth_k=smooth_k,
    )


def _check_pvthreshd(pvthreshd: Any) -> None:
    """Warns once of a threshold by which the original would leave out what is computed here."""
    global _warned_of_pvthreshd
    if _warned_of_pvthreshd or is_compiling():
        return
    found = per_head("pvthreshd", pvthreshd)
    smallest = min(found, default=_SMALL_PVTHRESHD) if isinstance(found, tuple) else found
    if smallest < _SMALL_PVTHRESHD:
        _warned_of_pvthreshd = True
        warnings.warn(
            f"pvthreshd: value is {smallest:g}, and products below 2 ** -{smallest:g} are computed here, not skipped: "
            "more exact than the original, and no faster than with 50",
            stacklevel=4,
        )


def _sparsity(q: Any, k: Any, block_map: Any, block_q: int, block_k: int, asked: Request, kv_lens: Any = None) -> float:
    tokens = 1 if asked.tensor_layout == "NHD" else 2
    rows = k.shape[tokens]
    # A GPU's are read to the host, as the map is; there they may say more than there are keys.
    given = kv_lens.tolist() if hasattr(kv_lens, "tolist") else kv_lens
    lens = [rows] * q.shape[0] if given is None else [min(max(length, 0), rows) for length in given]
    return sparsity(block_map, block_q, block_k, q.shape[tokens], lens, asked)


def _results(out: Any, others: list[Any], output_dtype: Any) -> Any:
    if output_dtype is not None:
        out = out.to(output_dtype) if hasattr(out, "to") else out.astype(output_dtype)
    return (out, *others) if others else out
