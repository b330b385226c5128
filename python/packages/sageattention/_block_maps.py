"""Maps of blocks as callers have them, and what share of the blocks they leave out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sageattention._request import Request

BlockSizes = tuple[int, int]


def map_shape(q: Any, k: Any, tensor_layout: str, block_q: int, block_k: int) -> tuple[int, ...]:
    """`[batch, heads, q_blocks, k_blocks]` of a map for q and k, which have four dimensions."""
    heads, tokens = (2, 1) if tensor_layout == "NHD" else (1, 2)
    return (q.shape[0], q.shape[heads], -(-q.shape[tokens] // block_q), -(-k.shape[tokens] // block_k))


def given_map(q: Any, k: Any, mask_id: Any, tensor_layout: str, sizes: Sequence[BlockSizes]) -> tuple[Any, int, int]:
    """A caller's map as booleans, with the queries and keys of its blocks: the first of `sizes` that its shape fits.

    Raises:
        TypeError, ValueError: if it is no tensor, lies elsewhere than q, or fits none of the sizes.
    """
    for name, tensor in (("q", q), ("k", k), ("mask_id", mask_id)):
        if not hasattr(tensor, "shape"):
            raise TypeError(f"{name}: type is {type(tensor).__name__}, expected a tensor")
    devices = [getattr(tensor, "device", None) for tensor in (q, mask_id)]
    if devices[0] != devices[1]:
        raise ValueError(f"mask_id: device is {devices[1]}, expected {devices[0]}, as q")
    return (mask_id != 0, *_sizes(q, k, mask_id, tensor_layout, sizes))


def _sizes(q: Any, k: Any, mask_id: Any, tensor_layout: str, sizes: Sequence[BlockSizes]) -> BlockSizes:
    if len(q.shape) != 4 or len(k.shape) != 4:
        # The call itself says what is wrong with them.
        return sizes[0]
    sequence = 1 if tensor_layout == "NHD" else 2
    rows, keys = q.shape[sequence], k.shape[sequence]
    counts = {(block_q, block_k): [-(-rows // block_q), -(-keys // block_k)] for block_q, block_k in sizes}
    for found, wanted in counts.items():
        if list(mask_id.shape[-2:]) == wanted:
            return found
    wanted_shapes = " or ".join(
        f"[batch, heads, {n}, {m}] (blocks of {block_q} x {block_k})" for (block_q, block_k), (n, m) in counts.items()
    )
    raise ValueError(f"mask_id: shape is {list(mask_id.shape)}, expected {wanted_shapes}")


def listed_map(indices: Any, number: Any, k_blocks: int) -> Any:
    """The map of lists of key blocks, torch's tensors: `indices` `[batch, heads, q_blocks, n]`, of which the first
    `number` count. What names no block is passed over."""
    torch = sys.modules["torch"]
    place = torch.arange(indices.shape[3], device=indices.device)
    listed = (place < number[..., None]) & (indices >= 0) & (indices < k_blocks)
    # What is not listed goes to a column of its own, which is then cut off.
    columns = torch.where(listed, indices, k_blocks).long()
    block_map = torch.zeros((*indices.shape[:3], k_blocks + 1), dtype=torch.bool, device=indices.device)
    return block_map.scatter(-1, columns, True)[..., :k_blocks].contiguous()


def sparsity(block_map: Any, block_q: int, block_k: int, q_len: int, kv_lens: Sequence[int], request: Request) -> float:
    """The share of blocks that a map leaves out, of those in which a causal mask and a window let some query see a key;
    `kv_lens` are the keys of each entry of the batch. Waits for the device."""
    seen = block_map.shape[1] * sum(
        count * len(row)
        for kv_len, count in Counter(kv_lens).items()
        for row in _seen(block_q, block_k, q_len, kv_len, request)
    )
    return 1.0 - float(block_map.sum()) / seen if seen else 0.0


def _seen(block_q: int, block_k: int, q_len: int, kv_len: int, request: Request) -> list[range]:
    """For each block of queries, the key blocks that some query of it sees."""
    diagonal = kv_len - q_len if request.causal_alignment == "bottom_right" else 0
    left, right = request.window_left, 0 if request.is_causal else request.window_right
    rows = []
    for first in range(0, q_len, block_q):
        last = min(first + block_q, q_len) - 1
        start = 0 if left is None else max(0, first + diagonal - left)
        end = kv_len if right is None else min(kv_len, last + diagonal + right + 1)
        rows.append(range(start // block_k, -(-end // block_k)) if start < end else range(0))
    return rows
