"""The original's public functions, by its names, signatures and defaults.

Common to all of them:

**Tensors** are torch's, numpy's, CuPy's, JAX's, or of any library that speaks DLPack and the array API; all of one
library, dtype and device. On the CPU float32, float16 and bfloat16; on NVIDIA GPUs, from compute capability 7.5 on,
float16 and bfloat16 (float32 there raises TypeError: convert it, nothing is rounded behind your back). Any strides do;
a head whose channels are not neighbours in memory is copied first. Inputs are never changed.

**Shapes**: q `[batch, heads, seq, head_dim]` ("HND") or `[batch, seq, heads, head_dim]` ("NHD"); k and v alike, with a
number of heads that divides q's (grouped-query attention, nothing is expanded) and any length. head_dim is 1 to
576 for q and k, and 1 to 512 for v, which may have another than q and k; GPUs compute more than 256 in 16 bits. k and v
of batch 1 are every batch entry's, and are not copied.
The output has q's shape, but v's head_dim, and q's dtype, and is contiguous.

**Log-sum-exp** (`return_lse=True`): float32 `[batch, heads, q_len]` in any layout, natural logarithm, of the scores
before K was smoothed: outputs of parts of K and V can be merged with it.

**Causal masks** with q_len != kv_len are aligned bottom-right: the last query sees the last key, as FlashAttention and
KV caches have it. A row that sees no key is zeros, with log-sum-exp -inf.

**Masks** (`attn_mask`): bool (True: visible) or added to the scaled scores (float), broadcastable to
`[batch, heads, q_len, kv_len]`, alone or on top of a causal mask.

**Windows and soft caps** (`window`, `logit_softcap`), dense and packed, alone or on top of the above. A window is
(left, right): keys further before or after the diagonal are hidden. None or -1 is no limit, as in flash-attention; a
single number is refused, because programs mean different things by it. A soft cap of 0 is none.

**Attention sinks** (`sinks`, of GPT-OSS; `s_aux` is taken for it): float32 `[heads]`, natural units, a logit of each
query head that joins its rows' denominator and has no value: `out = sum(exp(s) v) / (sum(exp(s)) + exp(sink))`. Neither
`sm_scale` nor a soft cap touches it, and -inf is none. The log-sum-exp has it in it, as that of flash-attention's
kernels with sinks (`flash_attn.cute`): parts merge when exactly one of them has the sinks. A row that sees no key is
zeros, with the sink as its log-sum-exp.

**Key lengths** (`kv_lens`; flash-attention's `seqused_k` and `cache_seqlens` are taken for it): how many keys each
entry of the batch has, where they are padded or k and v are a cache that is not full yet. The first `kv_lens[b]` keys
of entry b count, and what lies behind them has no influence at all. Causal masks and windows are aligned with that
length: bottom-right, the last query of an entry sees its key `kv_lens[b] - 1`. An entry without keys is zeros. They are
a list, an array of numpy's, or integers `[batch]` of q's library. Those in the host's memory are checked, and beside a
GPU's tensors copied there, which waits for it. int32 in a GPU's memory is read there when the work runs, without
waiting, also by graphs that are replayed, and what exceeds k's length is cut off. A mask (`attn_mask`) covers all of
k's keys. For packed sequences there is `cu_seqlens_k`.

**GPUs**: work is put on the caller's current stream and not waited for.

**Autocast** (torch): q, k, v and an additive mask are cast as torch casts those of its own function, so that q and k
in float32 after a normalisation go together with v in bfloat16. The output has autocast's dtype then.

**Errors**: ValueError (shapes, strides, values), TypeError (dtypes), NotImplementedError (what no kernel here computes,
gradients included), MemoryError (a GPU's memory), RuntimeError (its driver otherwise). Each names the tensor or option,
the value found and the value wanted.
Derivatives are not computed: tensors that require their gradient, or carry a tangent (`torch.func.jvp`), are refused.

**Keywords**: callers' other names of an option are taken (`softmax_scale`, `scale` and `scaling` for `sm_scale`;
`causal` for `is_causal`; `window_size` for `window`; `softcap` for `logit_softcap`); two names with different values
are a TypeError. A keyword that would change the result and that nothing here computes (`dropout_p=0.1`, `alibi_slopes`,
`out`, ...) raises NotImplementedError, a slip (`is_casual`) TypeError; hints to other kernels are ignored.

**Without the kernel's GPU**: functions that name a GPU kernel compute its scheme on the CPU too, with the same integers
and the same rounding of P and V, so that its accuracy can be judged there; `sageattn` is faster and more accurate. GPUs
that lack the kernel compute one that is at least as accurate: scales of fewer keys where it has tiles of its own, and
before sm_89 values in 16 bits (for FP8).
"""

from __future__ import annotations

import warnings
from typing import Any, Optional

from sageattention import _values
from sageattention._frameworks import dense, varlen
from sageattention._keywords import callers_keywords, shown
from sageattention._request import request


@callers_keywords
def sageattn(
    q: Any,
    k: Any,
    v: Any,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: Optional[float] = None,
    return_lse: bool = False,
    attn_mask: Any = None,
    *,
    smoothing: bool = True,
    scheme: Optional[str] = None,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """Attention with the fastest accurate scheme of the device at hand.

    Args:
        q: `[batch, heads, q_len, head_dim]` ("HND") or `[batch, q_len, heads, head_dim]` ("NHD").
        k: As q, with heads that divide q's, and any length.
        v: As k, but maybe of another head_dim.
        tensor_layout: "HND" or "NHD".
        is_causal: Whether a query sees no later key.
        sm_scale: Factor on QKᵀ, above 0; `1 / sqrt(head_dim)` when None.
        return_lse: Whether to return (out, log-sum-exp).
        attn_mask: Bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`.
        smoothing: False computes without subtracting K's mean, which is less accurate. Ours, not the original's: the
            original ignores ComfyUI's `smooth_k=False` here, and so do we, because images come out worse with it.
        scheme: The name of a scheme, such as "full" or "sage2-int8-fp8-per-thread", in place of the device's choice.
        causal_alignment: "bottom_right" or "top_left": where the diagonal lies when q_len != kv_len.
        window: (left, right): keys further before or after the diagonal are hidden; None or -1 is no limit.
        logit_softcap: Scaled scores s become `softcap * tanh(s / softcap)`; None or 0 leaves them.
        sinks: Float32 `[heads]`: for each query head a logit that joins the softmax's denominator and has no value, as
            GPT-OSS has them (`s_aux` in transformers).
        kv_lens: Integers `[batch]`: how many keys each entry of the batch has, the first ones of k and v.

    Returns:
        The output in q's dtype and shape, but v's head_dim; with `return_lse` a pair of it and float32
        `[batch, heads, q_len]`.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as this module says.

    Source: `sageattn` of SageAttention 2.2, https://arxiv.org/abs/2411.10958.
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
    )
    return_lse = _values.flag("return_lse", return_lse)
    return dense(q, k, v, asked, attn_mask=attn_mask, sinks=sinks, kv_lens=kv_lens, return_lse=return_lse)


@callers_keywords
def sageattn_varlen(
    q: Any,
    k: Any,
    v: Any,
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
    """Attention of packed sequences of different lengths.

    Args:
        q: `[total_q, heads, head_dim]`.
        k: `[total_k, kv_heads, head_dim]`, heads dividing q's.
        v: As k, but maybe of another head_dim.
        cu_seqlens_q: int32 or int64 `[sequences + 1]`: sequence b is rows `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1]`.
            An array of q's library, or a list.
        cu_seqlens_k: Likewise for k and v.
        max_seqlen_q: The longest sequence of q, or more. On a GPU longer ones are cut off; the CPU looks for itself.
            None finds it, for which a GPU is waited for; in graphs it is the number of rows.
        max_seqlen_k: Likewise for k and v.
        is_causal: Whether a query sees no later key of its sequence.
        sm_scale: Factor on QKᵀ; `1 / sqrt(head_dim)` when None.
        smooth_k: Whether K's mean over each sequence (not over all, as in the original) is subtracted.
        return_lse: Ours: whether to return (out, float32 `[heads, total_q]`) as well.
        scheme: Ours: the name of a scheme, in place of the device's own choice.
        causal_alignment: Ours: "bottom_right" or "top_left", where the diagonal of each sequence lies.
        window: Ours: (left, right), as in `sageattn`, within each sequence.
        logit_softcap: Ours: as in `sageattn`.
        sinks: Ours: as in `sageattn`.

    Returns:
        `[total_q, heads, head_dim]`, v's head_dim. On a GPU, rows that belong to no sequence are not written.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as this module says. Boundaries are
        checked on the CPU only: on a GPU that would mean waiting for it, and its kernels cut off what lies outside the
        tensors.

    Source: `sageattn_varlen` of SageAttention 2.2.
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
    max_seqlen_q = _values.length("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = _values.length("max_seqlen_k", max_seqlen_k)
    return_lse = _values.flag("return_lse", return_lse)
    return varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, asked, sinks=sinks, return_lse=return_lse
    )


@callers_keywords
def sageattn_qk_int8_pv_fp16_triton(
    q: Any,
    k: Any,
    v: Any,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    attn_mask: Any = None,
    sm_scale: Optional[float] = None,
    smooth_k: bool = True,
    return_lse: bool = False,
    *,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """SageAttention1: INT8 QKᵀ with a scale for each block, PV in FP16. No Triton is involved.

    `quantization_backend` is "triton" or "cuda": whose rounding is followed. The rest as `sageattn`; unlike the
    original, a mask goes together with `is_causal`, and a causal mask with q_len != kv_len.

    Source: the function of that name of SageAttention 2.2, https://arxiv.org/abs/2410.02367.
    """
    schemes = {"triton": "sage1-int8-fp16", "cuda": "sage1-int8-fp16-cuda-quantiser"}
    scheme = _one_of("quantization_backend", quantization_backend, schemes)
    return _by_scheme(
        scheme,
        q,
        k,
        v,
        attn_mask,
        sinks,
        kv_lens,
        return_lse,
        tensor_layout=tensor_layout,
        is_causal=is_causal,
        sm_scale=sm_scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        smooth_k=smooth_k,
    )


@callers_keywords
def sageattn_qk_int8_pv_fp16_cuda(
    q: Any,
    k: Any,
    v: Any,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: Optional[float] = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    attn_mask: Any = None,
    *,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """SageAttention2: INT8 QKᵀ, PV in FP16.

    `qk_quant_gran` is "per_thread" or "per_warp"; `pv_accum_dtype` is "fp32", "fp16" or "fp16+fp32". V is smoothed only
    with "fp16", whose sums are narrow (here they are float32 instead, which is more accurate and as fast); otherwise
    `smooth_v` warns and is ignored, as in the original. The rest as `sageattn`.

    Source: the function of that name of SageAttention 2.2, https://arxiv.org/abs/2411.10958.
    """
    sums = _one_of("pv_accum_dtype", pv_accum_dtype, {"fp32": "", "fp16": "-f16", "fp16+fp32": "-f16f32"})
    smooth = _smooth_v(smooth_v, pv_accum_dtype, "fp16")
    scheme = f"sage2-int8-fp16{sums}{smooth}{_granularity(qk_quant_gran)}"
    return _by_scheme(
        scheme,
        q,
        k,
        v,
        attn_mask,
        sinks,
        kv_lens,
        return_lse,
        tensor_layout=tensor_layout,
        is_causal=is_causal,
        sm_scale=sm_scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        smooth_k=smooth_k,
    )


@callers_keywords
def sageattn_qk_int8_pv_fp8_cuda(
    q: Any,
    k: Any,
    v: Any,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: Optional[float] = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    attn_mask: Any = None,
    *,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """SageAttention2 and 2++: INT8 QKᵀ, PV in FP8; on GPUs before compute capability 8.9 in 16 bits.

    `qk_quant_gran` is "per_thread" or "per_warp"; `pv_accum_dtype` is "fp32+fp16" (2++), "fp32+fp32" or "fp32". V is
    smoothed only with "fp32"; otherwise `smooth_v` warns and is ignored, as in the original. The rest as `sageattn`.

    Source: the function of that name of SageAttention 2.2, https://arxiv.org/abs/2505.21136.
    """
    forms = {"fp32+fp16": "sage2pp-int8-fp8", "fp32+fp32": "sage2-int8-fp8", "fp32": "sage2-int8-fp8-f32"}
    form = _one_of("pv_accum_dtype", pv_accum_dtype, forms)
    scheme = f"{form}{_smooth_v(smooth_v, pv_accum_dtype, 'fp32')}{_granularity(qk_quant_gran)}"
    return _by_scheme(
        scheme,
        q,
        k,
        v,
        attn_mask,
        sinks,
        kv_lens,
        return_lse,
        tensor_layout=tensor_layout,
        is_causal=is_causal,
        sm_scale=sm_scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        smooth_k=smooth_k,
    )


@callers_keywords
def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: Any,
    k: Any,
    v: Any,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: Optional[float] = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
    attn_mask: Any = None,
    *,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: Any = None,
    kv_lens: Any = None,
    **kwargs: Any,
) -> Any:
    """SageAttention2 on Hopper: INT8 QKᵀ, PV in FP8. Runs on any GPU, before compute capability 8.9 with PV in 16 bits.

    `qk_quant_gran` is "per_thread" or "per_warp"; `pv_accum_dtype` is "fp32+fp32" ("fp32" raises NotImplementedError,
    as in the original). On GPUs scales are of 64 keys, finer than the original's 128. The rest as `sageattn`.

    Source: the function of that name of SageAttention 2.2.
    """
    if pv_accum_dtype == "fp32":
        raise NotImplementedError("pv_accum_dtype: value is fp32, expected fp32+fp32: one level is too coarse here")
    _one_of("pv_accum_dtype", pv_accum_dtype, {"fp32+fp32": ""})
    scheme = f"sage2-int8-fp8-sm90{_granularity(qk_quant_gran)}"
    return _by_scheme(
        scheme,
        q,
        k,
        v,
        attn_mask,
        sinks,
        kv_lens,
        return_lse,
        tensor_layout=tensor_layout,
        is_causal=is_causal,
        sm_scale=sm_scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        smooth_k=smooth_k,
    )


def _by_scheme(
    scheme: str, q: Any, k: Any, v: Any, attn_mask: Any, sinks: Any, kv_lens: Any, return_lse: Any, **options: Any
) -> Any:
    """Attention with a kernel's scheme, or with the nearest that the device has; `options` are those of `request`."""
    asked = request(scheme=scheme, nearest=True, **options)
    return_lse = _values.flag("return_lse", return_lse)
    return dense(q, k, v, asked, attn_mask=attn_mask, sinks=sinks, kv_lens=kv_lens, return_lse=return_lse)


def _one_of(name: str, value: Any, names: dict[str, str]) -> str:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name}: value is {shown(value)}, expected {' or '.join(names)}")
    return names[value]


def _granularity(qk_quant_gran: str) -> str:
    return _one_of("qk_quant_gran", qk_quant_gran, {"per_thread": "-per-thread", "per_warp": "-per-warp"})


def _smooth_v(smooth_v: bool, pv_accum_dtype: str, narrow: str) -> str:
    """The part of a scheme's name that says V is smoothed, which only the narrow sums profit from."""
    smooth_v = _values.flag("smooth_v", smooth_v)
    if smooth_v and pv_accum_dtype != narrow:
        warnings.warn(f"pv_accum_dtype: value is {pv_accum_dtype}, and smooth_v is for {narrow}: ignored", stacklevel=4)
        return ""
    return "-smooth-v" if smooth_v else ""
