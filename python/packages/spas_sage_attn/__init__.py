"""SpargeAttn's functions, by the original's names.

A map of blocks that the caller gives is computed on the CPU. GPU kernels that skip blocks, and the prediction of such a
map from Q and K, do not exist here yet: those calls raise NotImplementedError.
"""

from __future__ import annotations

from typing import Any, Optional

from sageattention._frameworks import dense
from sageattention._request import check_ignored, request

__all__ = [
    "block_sparse_sage2_attn_cuda",
    "spas_sage2_attn_meansim_cuda",
    "spas_sage2_attn_meansim_topk_cuda",
    "spas_sage_attn_meansim_cuda",
    "spas_sage_attn_meansim_topk_cuda",
]

_BLOCK_Q, _BLOCK_K = 128, 64


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
    **kwargs: Any,
) -> Any:
    """Attention of the blocks that a map names. CPU tensors; on a GPU NotImplementedError.

    Args:
        q: `[batch, heads, q_len, head_dim]` ("HND") or `[batch, q_len, heads, head_dim]` ("NHD").
        k: As q, with heads that divide q's, and any length.
        v: As k.
        mask_id: `[batch, heads, ceil(q_len / 128), ceil(kv_len / 64)]`, not 0 where the block is computed; None is all.
        dropout_p: Must be 0.
        scale: Factor on QKᵀ; `1 / sqrt(head_dim)` when None.
        smooth_k: Whether K's mean is subtracted before quantising.
        pvthreshd: Blocks whose probabilities are below `2 ** -pvthreshd` may be skipped; here none is, which is exact.
        attention_sink: Whether the first keys' blocks are computed whatever the map says.
        tensor_layout: "HND" or "NHD".
        output_dtype: A dtype of torch to convert to; q's when None.
        return_sparsity: Whether to return (out, the share of blocks left out) as well.

    Returns:
        The output in q's shape. Rows without a block are zeros.

    Source: the function of that name of SpargeAttn, https://arxiv.org/abs/2502.18137.
    """
    check_ignored("block_sparse_sage2_attn_cuda", {**kwargs, "dropout_p": dropout_p})
    block_mask = None
    sparsity = 0.0
    if mask_id is not None:
        blocks = mask_id != 0
        if attention_sink:
            blocks[..., 0] = True
        sparsity = 1.0 - float(blocks.sum()) / max(1, blocks.size if isinstance(blocks.size, int) else blocks.numel())
        block_mask = (blocks, _BLOCK_Q, _BLOCK_K)
    asked = request(tensor_layout, False, scale, scheme="sparge-int8-fp8", nearest=True, smooth_k=smooth_k)
    out = dense(q, k, v, asked, block_mask=block_mask)
    if output_dtype is not None:
        out = out.to(output_dtype)
    return (out, sparsity) if return_sparsity else out


def _no_prediction(function: str) -> NotImplementedError:
    return NotImplementedError(
        f"{function} is not supported: the prediction of blocks from Q and K is not built yet; sageattention.sageattn "
        "computes all blocks, block_sparse_sage2_attn_cuda those of a map of yours (CPU)"
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
