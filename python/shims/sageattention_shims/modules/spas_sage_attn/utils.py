"""What callers of the original's kernels prepare their arguments with: scales, integers and lists of blocks.

SageSLA (TurboDiffusion, FastVideo) calls these kernels itself. Here they are written in torch around our attention: see
`spas_sage_attn._qattn`.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

__all__ = ["block_map_lut_triton", "get_vanilla_qk_quant"]

# Keeps the scale of a block of zeros from being 0.
_EPSILON = 1e-7


def get_vanilla_qk_quant(
    q: Tensor, k: Tensor, km: Optional[Tensor] = None, BLKQ: int = 128, BLKK: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q and K in INT8, with a scale for each block.

    Args:
        q: `[batch, heads, q_len, head_dim]`.
        k: `[batch, kv_heads, kv_len, head_dim]`.
        km: What is subtracted from K first, broadcastable to it, as `k.mean(dim=-2, keepdim=True)`.
        BLKQ: Queries of a block.
        BLKK: Keys of a block.

    Returns:
        q in int8, float32 `[batch, heads, q_blocks]`, k in int8, float32 `[batch, kv_heads, k_blocks]`.
    """
    return (*_quantized(q, None, BLKQ), *_quantized(k, km, BLKK))


def block_map_lut_triton(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of a map as lists.

    Args:
        block_map: `[batch, heads, q_blocks, k_blocks]`, not 0 where a block is computed.

    Returns:
        int32 `[batch, heads, q_blocks, k_blocks]`: the first block of each list, then the steps from one to the next,
        then zeros; and int32 `[batch, heads, q_blocks]`: how many are listed.
    """
    if block_map.ndim != 4:
        shape = list(block_map.shape)
        raise ValueError(f"block_map: shape is {shape}, expected [batch, heads, q_blocks, k_blocks]")
    kept = block_map != 0
    # A stable sort puts the blocks that are kept first, in their order.
    blocks = torch.sort((~kept).to(torch.uint8), dim=-1, stable=True).indices
    number = kept.sum(dim=-1, dtype=torch.int32)
    steps = torch.diff(blocks, dim=-1, prepend=torch.zeros_like(blocks[..., :1]))
    listed = torch.arange(kept.shape[-1], device=kept.device) < number[..., None]
    return torch.where(listed, steps, 0).to(torch.int32), number


def _quantized(x: Tensor, mean: Optional[Tensor], block: int) -> tuple[Tensor, Tensor]:
    centred = (x if mean is None else x - mean).float()
    parts = centred.split(block, dim=2)
    scales = torch.stack([part.abs().amax(dim=(2, 3)) for part in parts], dim=-1) / 127 + _EPSILON
    return (centred / per_token(scales, block, x.shape[2])).round().to(torch.int8), scales


def per_token(scales: Tensor, block: int, tokens: int) -> Tensor:
    """The scale of each token's block, to be multiplied by `[batch, heads, tokens, head_dim]`."""
    return scales.repeat_interleave(block, dim=-1)[..., :tokens, None]
