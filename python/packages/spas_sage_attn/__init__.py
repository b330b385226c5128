"""SpargeAttn's functions, by the original's names.

The blocks of a map that the caller gives are computed, on the CPU and on GPUs. The prediction of such a map from Q and K
does not exist here yet: those calls raise NotImplementedError.
"""

from __future__ import annotations

from typing import Any, Optional

from sageattention import _values
from sageattention._frameworks import dense, has_capability_9
from sageattention._installed import warn_if_shared
from sageattention._keywords import callers_keywords
from sageattention._request import request

__all__ = [
    "block_sparse_sage2_attn_cuda",
    "spas_sage2_attn_meansim_cuda",
    "spas_sage2_attn_meansim_topk_cuda",
    "spas_sage_attn_meansim_cuda",
    "spas_sage_attn_meansim_topk_cuda",
]

# Queries and keys of a block in a map: on GPUs of compute capability 9, and elsewhere.
_HOPPER, _ELSEWHERE = (64, 128), (128, 64)

warn_if_shared(__file__)


@callers_keywords
def block_sparse_sage2_attn_cuda(
    q: Any,
    k: Any,
    v: Any,
    mask_id: Any = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    smooth_k: bool = True,
    pvthreshd: float = 50,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: Any = None,
    return_sparsity: bool = False,
    *,
    is_causal: bool = False,
    return_lse: bool = False,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    **kwargs: Any,
) -> Any:
    """Attention of the blocks that a map names, on the CPU and on GPUs; the others are left out.

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
        pvthreshd: Blocks whose probabilities are below `2 ** -pvthreshd` may be skipped; here none is, which is exact.
        attention_sink: Whether the first keys' blocks are computed whatever the map says.
        tensor_layout: "HND" or "NHD".
        output_dtype: A dtype of torch to convert to; q's when None.
        return_sparsity: Whether to return the share of blocks left out as well.
        is_causal: Ours, as all that follow and as in `sageattention.sageattn`: whether a query sees no later key.
        return_lse: Whether to return float32 `[batch, heads, q_len]` as well, before the sparsity.
        causal_alignment: "bottom_right" or "top_left".
        window: (left, right); None or -1 is no limit.
        logit_softcap: Soft cap of the scaled scores.

    Returns:
        The output in q's shape; where asked for, a tuple of it, the log-sum-exp and the sparsity. Rows without a block
        are zeros.

    Source: the function of that name of SpargeAttn, https://arxiv.org/abs/2502.18137.
    """
    if _values.number("dropout_p", dropout_p):
        raise NotImplementedError(f"dropout_p: value is {dropout_p}, expected 0: dropout is not computed")
    asked = request(
        tensor_layout,
        is_causal,
        scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        scheme="sparge-int8-fp8",
        nearest=True,
        smooth_k=smooth_k,
    )
    return_lse = _values.flag("return_lse", return_lse)
    block_mask = None
    sparsity = 0.0
    if mask_id is not None:
        sizes = _block_sizes(q, k, mask_id, tensor_layout)
        blocks = mask_id != 0
        if _values.flag("attention_sink", attention_sink):
            blocks[..., 0] = True
        if return_sparsity:
            # Waits for the device, which a call that does not ask must not.
            all_blocks = blocks.size if isinstance(blocks.size, int) else blocks.numel()
            sparsity = 1.0 - float(blocks.sum()) / max(1, all_blocks)
        block_mask = (blocks, *sizes)
    result = dense(q, k, v, asked, block_mask=block_mask, return_lse=return_lse)
    out, *lse = result if return_lse else (result,)
    if output_dtype is not None:
        out = out.to(output_dtype) if hasattr(out, "to") else out.astype(output_dtype)
    results = (out, *lse, *((sparsity,) if return_sparsity else ()))
    return results if len(results) > 1 else out


def _block_sizes(q: Any, k: Any, mask_id: Any, tensor_layout: str) -> tuple[int, int]:
    """Queries and keys of a map's blocks."""
    for name, tensor in (("q", q), ("k", k), ("mask_id", mask_id)):
        if not hasattr(tensor, "shape"):
            raise TypeError(f"{name}: type is {type(tensor).__name__}, expected a tensor")
    devices = [getattr(tensor, "device", None) for tensor in (q, mask_id)]
    if devices[0] != devices[1]:
        raise ValueError(f"mask_id: device is {devices[1]}, expected {devices[0]}, as q")
    if len(q.shape) != 4 or len(k.shape) != 4:
        # The call itself says what is wrong with them.
        return _ELSEWHERE
    sequence = 1 if tensor_layout == "NHD" else 2
    rows, keys = q.shape[sequence], k.shape[sequence]
    first, second = (_HOPPER, _ELSEWHERE) if has_capability_9(q) else (_ELSEWHERE, _HOPPER)
    counts = {sizes: [-(-rows // sizes[0]), -(-keys // sizes[1])] for sizes in (first, second)}
    for sizes, wanted in counts.items():
        if list(mask_id.shape[-2:]) == wanted:
            return sizes
    wanted = " or ".join(
        f"[batch, heads, {n}, {m}] (blocks of {sizes[0]} x {sizes[1]})" for sizes, (n, m) in counts.items()
    )
    raise ValueError(f"mask_id: shape is {list(mask_id.shape)}, expected {wanted}")


def _no_prediction(function: str) -> NotImplementedError:
    return NotImplementedError(
        f"{function} is not supported: the prediction of blocks from Q and K is not built yet; sageattention.sageattn "
        "computes all blocks, block_sparse_sage2_attn_cuda those of a map of yours"
    )


def spas_sage2_attn_meansim_cuda(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: Optional[float] = None, smooth_k: bool = True, simthreshd1: Any = 0.6, cdfthreshd: Any = 0.98,
    pvthreshd: Any = 50, attention_sink: bool = False, tensor_layout: str = "HND", output_dtype: Any = None,
    return_sparsity: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """Raises NotImplementedError: blocks cannot be predicted here yet."""
    raise _no_prediction("spas_sage2_attn_meansim_cuda")


def spas_sage2_attn_meansim_topk_cuda(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: Optional[float] = None, smooth_k: bool = True, simthreshd1: Any = -0.1, cdfthreshd: Any = None,
    topk: Any = 0.5, pvthreshd: Any = 50, attention_sink: bool = False, tensor_layout: str = "HND",
    output_dtype: Any = None, return_sparsity: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """Raises NotImplementedError: blocks cannot be predicted here yet."""
    raise _no_prediction("spas_sage2_attn_meansim_topk_cuda")


def spas_sage_attn_meansim_cuda(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: Optional[float] = None, smooth_k: bool = True, simthreshd1: Any = 0.6, cdfthreshd: Any = 0.98,
    pvthreshd: Any = 50, attention_sink: bool = False, tensor_layout: str = "HND", output_dtype: Any = None,
    return_sparsity: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """Raises NotImplementedError: blocks cannot be predicted here yet."""
    raise _no_prediction("spas_sage_attn_meansim_cuda")


def spas_sage_attn_meansim_topk_cuda(
    q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: Optional[float] = None, smooth_k: bool = True, simthreshd1: Any = -0.1, cdfthreshd: Any = None,
    topk: Any = 0.5, pvthreshd: Any = 50, attention_sink: bool = False, tensor_layout: str = "HND",
    output_dtype: Any = None, return_sparsity: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """Raises NotImplementedError: blocks cannot be predicted here yet."""
    raise _no_prediction("spas_sage_attn_meansim_topk_cuda")
