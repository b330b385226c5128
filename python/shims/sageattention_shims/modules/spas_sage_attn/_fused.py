"""The original's kernels that prepare V for its attention, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["scale_fuse_quant_cuda", "transpose_pad_permute_cuda"]


def transpose_pad_permute_cuda(input: Tensor, output: Tensor, tensor_layout: int) -> None:
    """V with its tokens side by side, filled up with zeros.

    Within a tile the original also orders tokens as its tensor cores read them; here they stay in their order, which
    only `spas_sage_attn._qattn` has to know.

    Args:
        input: `[batch, heads, kv_len, head_dim]` (layout 1) or `[batch, kv_len, heads, head_dim]` (layout 0).
        output: Written to: `[batch, heads, head_dim, padded]`, or `[batch, head_dim, heads, padded]`.
        tensor_layout: 1 for "HND", 0 for "NHD".
    """
    tokens = 2 if tensor_layout else 1
    output.zero_()
    output[..., : input.shape[tokens]] = input.transpose(tokens, 3)


def scale_fuse_quant_cuda(
    input: Tensor, output: Tensor, scale: Tensor, num_tokens: int, scale_max: float, tensor_layout: int
) -> None:
    """V in FP8, with a scale for each channel.

    Args:
        input: As `transpose_pad_permute_cuda` writes it.
        output: Written to: float8_e4m3fn of that shape.
        scale: Written to: float32 `[batch, heads, head_dim]`: the largest magnitude of each channel over `scale_max`.
        num_tokens: How many tokens are no padding.
        scale_max: What the largest magnitude becomes.
        tensor_layout: 1 for "HND", 0 for "NHD".
    """
    values = input.float()
    largest = values[..., :num_tokens].abs().amax(dim=-1)
    # A channel of zeros stays one.
    scales = torch.where(largest > 0, largest / scale_max, 1.0)
    output.copy_((values / scales[..., None]).to(output.dtype))
    scale.copy_(scales if tensor_layout else scales.transpose(1, 2))
