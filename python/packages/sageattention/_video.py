"""Video sparse attention, FastVideo's functions: torch's tensors alone."""

from __future__ import annotations

import math
import sys
from typing import Any, Optional, Union

from sageattention import _values
from sageattention._block_maps import listed_map
from sageattention._frameworks import dense, is_torch
from sageattention._keywords import shown
from sageattention._request import request

# Tokens of a block that its users have, and of the blocks that are then computed, which no kernel has of 256.
_BLOCKS = {64: 64, 128: 128, 256: 128}


def video_sparse_attn(
    q: Any,
    k: Any,
    v: Any,
    variable_block_sizes: Any,
    q_variable_block_sizes: Any,
    topk: int,
    block_size: Union[int, tuple[int, int, int]] = 64,
    compress_attn_weight: Any = None,
    *,
    scheme: Optional[str] = None,
) -> Any:
    """VSA: attention of means of blocks, times a gate, and beside it attention of the blocks whose means score highest.

    A video is cut into cubes, each padded to a block of `block_size` tokens. The coarse branch is
    `softmax(q_c k_cᵀ / sqrt(head_dim)) v_c` of the blocks' means; the sparse branch is attention of the `topk` key
    blocks that score highest there, over the keys that are no padding. Nothing waits for a GPU.

    Args:
        q: torch `[batch, heads, q_blocks * block_size, head_dim]`.
        k: `[batch, heads, k_blocks * block_size, head_dim]`.
        v: As k.
        variable_block_sizes: Integers `[k_blocks]`: how many tokens of each key block count; they come first in it.
            What padding holds does not matter.
        q_variable_block_sizes: `[q_blocks]`, likewise of q. Outputs of padding are of no use.
        topk: Key blocks that a block of queries attends to; all where there are fewer.
        block_size: Tokens of a block, 64, 128 or 256; or the sides of a cube of so many.
        compress_attn_weight: The gate, broadcastable to q's shape; 1 when None.
        scheme: Ours: the name of a scheme for the sparse branch, in place of the device's choice.

    Returns:
        The output in q's shape and dtype.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.

    Source: `video_sparse_attn` of FastVideo, https://arxiv.org/abs/2505.13389.
    """
    block = _block_tokens(block_size)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check(name, tensor, block)
    if v.shape != k.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        wanted = f"[{q.shape[0]}, {q.shape[1]}, k_len, {q.shape[3]}]"
        raise ValueError(f"k, v: shapes are {list(k.shape)} and {list(v.shape)}, expected {wanted}, as q")
    k_counts = _counts("variable_block_sizes", variable_block_sizes, k, block)
    q_counts = _counts("q_variable_block_sizes", q_variable_block_sizes, q, block)
    topk = _values.integer("topk", topk)
    if topk < 1:
        raise ValueError(f"topk: value is {topk}, expected at least 1 block")

    torch = sys.modules["torch"]
    q_means, k_means, v_means = (
        _means(x, counts, block) for x, counts in ((q, q_counts), (k, k_counts), (v, k_counts))
    )
    scores = q_means @ k_means.transpose(-1, -2) / math.sqrt(q.shape[-1])
    # A block without tokens is neither chosen nor seen.
    scores = scores.masked_fill(k_counts == 0, -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    coarse = (weights @ v_means).repeat_interleave(block, dim=2)
    chosen = torch.topk(scores, min(topk, scores.shape[-1]), dim=-1).indices
    block_map = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)

    asked = request("HND", False, None, scheme=scheme)
    fine = dense(q, k, v, asked, attn_mask=_key_mask(k_counts, block), block_mask=_blocks_of(block_map, block))
    return fine + (coarse if compress_attn_weight is None else coarse * compress_attn_weight)


def block_sparse_attn_from_indices(
    q: Any,
    k: Any,
    v: Any,
    q2k_idx: Any,
    q2k_num: Any,
    variable_block_sizes: Any,
    *,
    scheme: Optional[str] = None,
    sinks: Any = None,
) -> Any:
    """Attention of listed key blocks of 64 tokens: the kernel beneath VSA. Nothing waits for a GPU.

    Args:
        q: torch `[batch, heads, q_blocks * 64, head_dim]`.
        k: `[batch, kv_heads, k_blocks * 64, head_dim]`, kv_heads dividing q's heads.
        v: As k.
        q2k_idx: int32 `[batch, heads, q_blocks, n]`: the key blocks of each block of queries. What stands behind the
            first `q2k_num` of them, and what names no block, is passed over.
        q2k_num: int32 `[batch, heads, q_blocks]`: how many are listed.
        variable_block_sizes: Integers `[k_blocks]`: how many tokens of each key block count; they come first in it.
        scheme: Ours: the name of a scheme, in place of the device's choice.
        sinks: Ours: attention sinks, float32 `[heads]`, as in `sageattention.sageattn`.

    Returns:
        The output in q's shape and dtype, and the base-2 log-sum-exp, float32 `[batch, heads, q_len]`.

    Raises:
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as `sageattention.core` says.

    Source: the function of that name of FastVideo, https://arxiv.org/abs/2505.13389.
    """
    block = 64
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check(name, tensor, block)
    counts = _counts("variable_block_sizes", variable_block_sizes, k, block)
    rows = [q.shape[0], q.shape[1], q.shape[2] // block]
    for name, tensor, more in (("q2k_idx", q2k_idx, ", n"), ("q2k_num", q2k_num, "")):
        _check_tensor(name, tensor)
        if list(tensor.shape[:3]) != rows or tensor.ndim != 3 + bool(more):
            wanted = f"[{', '.join(map(str, rows))}{more}]"
            raise ValueError(f"{name}: shape is {list(tensor.shape)}, expected {wanted}")
    block_map = listed_map(q2k_idx, q2k_num, k.shape[2] // block)
    asked = request("HND", False, None, scheme=scheme)
    mask = _key_mask(counts, block)
    blocks = (block_map, block, block)
    out, lse = dense(q, k, v, asked, attn_mask=mask, sinks=sinks, block_mask=blocks, return_lse=True)
    return out, lse / math.log(2.0)


def _block_tokens(block_size: Any) -> int:
    if isinstance(block_size, (tuple, list)) and len(block_size) == 3:
        block = math.prod(_values.integer(f"block_size[{side}]", length) for side, length in enumerate(block_size))
    else:
        block = _values.integer("block_size", block_size)
    if block not in _BLOCKS:
        raise ValueError(
            f"block_size: value is {shown(block_size)}, expected 64, 128 or 256 tokens, or the sides of such a cube"
        )
    return block


def _check_tensor(name: str, tensor: Any) -> None:
    if not is_torch(tensor):
        raise TypeError(f"{name}: type is {type(tensor).__name__}, expected torch.Tensor")


def _check(name: str, tensor: Any, block: int) -> None:
    _check_tensor(name, tensor)
    if tensor.ndim != 4 or tensor.shape[2] % block:
        raise ValueError(f"{name}: shape is {list(tensor.shape)}, expected [batch, heads, blocks * {block}, head_dim]")


def _counts(name: str, sizes: Any, tensor: Any, block: int) -> Any:
    """How many tokens of each of a tensor's blocks count, on its device."""
    _check_tensor(name, sizes)
    wanted = tensor.shape[2] // block
    if sizes.ndim != 1 or sizes.shape[0] != wanted:
        raise ValueError(f"{name}: shape is {list(sizes.shape)}, expected [{wanted}], one for each block")
    if sizes.is_floating_point() or sizes.is_complex():
        raise TypeError(f"{name}: dtype is {str(sizes.dtype).removeprefix('torch.')}, expected int32 or int64")
    return sizes.to(tensor.device).clamp(0, block)


def _places(counts: Any, block: int) -> Any:
    """`[blocks, block]`: which tokens of each block count."""
    return sys.modules["torch"].arange(block, device=counts.device) < counts[:, None]


def _means(x: Any, counts: Any, block: int) -> Any:
    """Means of blocks over the tokens that count, in x's dtype; zeros where none does."""
    cut = x.unflatten(2, (counts.shape[0], block)).float()
    # Chosen, not multiplied: padding may hold what is no number.
    sums = cut.masked_fill(~_places(counts, block)[..., None], 0.0).sum(dim=3)
    return (sums / counts.clamp(min=1)[:, None]).to(x.dtype)


def _key_mask(counts: Any, block: int) -> Any:
    """Hides the keys of padding."""
    return _places(counts, block).reshape(1, 1, 1, -1)


def _blocks_of(block_map: Any, block: int) -> tuple[Any, int, int]:
    """A map in blocks that kernels have."""
    computed = _BLOCKS[block]
    for dim in (-1, -2) if block != computed else ():
        block_map = block_map.repeat_interleave(block // computed, dim=dim)
    return (block_map, computed, computed)
