"""The original's attention kernels by their names, for programs that call them themselves (SageSLA does).

They take what `spas_sage_attn.utils` and `spas_sage_attn._fused` made of Q, K and V. Our kernels quantise inside, so
that the integers are multiplied by their scales again, and attention of the listed blocks is computed of these, in
16 bits on a GPU: right, and slower than `block_sparse_sage2_attn_cuda` with Q, K and V.

Common arguments: `query` int8 `[batch, heads, q_len, head_dim]`, `key` int8, `output` which is written to, `lut` and
`valid_block_num` of `block_map_lut_triton`, `pv_threshold` of no effect (every listed block is computed, which is
exact), float32 `query_scale`, `key_scale` and `value_scale`, `tensor_layout` 1 ("HND"), `is_causal` (aligned top-left),
`qk_quant_gran` 1 (a scale for each block), `sm_scale`. Functions with a `pv_threshold` return an empty tensor, the
counts that nobody asked for; with `return_lse` a pair of it and the base-2 log-sum-exp, float32
`[batch, heads, q_len]`, of the scores of K as it is given.
"""

from __future__ import annotations

import math
from typing import Any, Optional

import torch
from sageattention._block_maps import listed_map
from sageattention._frameworks import dense
from sageattention._request import request
from sageattention._sparge_schemes import scheme_on
from torch import Tensor

from spas_sage_attn.utils import per_token

__all__ = [
    "qk_int8_sv_f16_accum_f16_block_sparse_attn_inst_buf_with_pv_threshold",
    "qk_int8_sv_f8_accum_f16_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold",
    "qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale",
    "qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_sm90",
    "qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold",
    "qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold_sm90",
]

_HOPPER, _ELSEWHERE = (64, 128), (128, 64)


def qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lut: Tensor, valid_block_num: Tensor,
    query_scale: Tensor, key_scale: Tensor, value_scale: Tensor, tensor_layout: int, is_causal: int,
    qk_quant_gran: int, sm_scale: float,
) -> None:  # fmt: skip
    """Blocks of 128 queries and 64 keys, values in FP8."""
    v = _values_of_fp8(value, value_scale, key, output)
    scales = (query_scale, key_scale)
    _attend(query, key, v, output, lut, valid_block_num, scales, tensor_layout, is_causal, qk_quant_gran, sm_scale)


def qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_sm90(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lut: Tensor, valid_block_num: Tensor,
    query_scale: Tensor, key_scale: Tensor, value_scale: Tensor, tensor_layout: int, is_causal: int,
    qk_quant_gran: int, sm_scale: float,
) -> None:  # fmt: skip
    """Blocks of 64 queries and 128 keys, values in FP8."""
    v = _values_of_fp8(value, value_scale, key, output)
    scales = (query_scale, key_scale)
    _attend(
        query, key, v, output, lut, valid_block_num, scales, tensor_layout, is_causal, qk_quant_gran, sm_scale, _HOPPER
    )


def qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lut: Tensor, valid_block_num: Tensor,
    pv_threshold: Tensor, query_scale: Tensor, key_scale: Tensor, value_scale: Tensor, tensor_layout: int,
    is_causal: int, qk_quant_gran: int, sm_scale: float, return_pv_count: int = 0, return_lse: Optional[bool] = None,
) -> Any:  # fmt: skip
    """Blocks of 128 queries and 64 keys, values in FP8."""
    v = _values_of_fp8(value, value_scale, key, output)
    scales = (query_scale, key_scale)
    _refuse_counts(return_pv_count)
    lse = _attend(
        query, key, v, output, lut, valid_block_num, scales, tensor_layout, is_causal, qk_quant_gran, sm_scale
    )
    return _no_counts(lse, return_lse)


def qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold_sm90(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lut: Tensor, valid_block_num: Tensor,
    pv_threshold: Tensor, query_scale: Tensor, key_scale: Tensor, value_scale: Tensor, tensor_layout: int,
    is_causal: int, qk_quant_gran: int, sm_scale: float, return_pv_count: int = 0, return_lse: Optional[bool] = None,
) -> Any:  # fmt: skip
    """Blocks of 64 queries and 128 keys, values in FP8."""
    v = _values_of_fp8(value, value_scale, key, output)
    scales = (query_scale, key_scale)
    _refuse_counts(return_pv_count)
    lse = _attend(
        query, key, v, output, lut, valid_block_num, scales, tensor_layout, is_causal, qk_quant_gran, sm_scale, _HOPPER
    )
    return _no_counts(lse, return_lse)


# What it sums in 16 bits is summed in 32 here.
qk_int8_sv_f8_accum_f16_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold = (
    qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale_with_pv_threshold
)


def qk_int8_sv_f16_accum_f16_block_sparse_attn_inst_buf_with_pv_threshold(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, lut: Tensor, valid_block_num: Tensor,
    pv_threshold: Tensor, query_scale: Tensor, key_scale: Tensor, tensor_layout: int, is_causal: int,
    qk_quant_gran: int, sm_scale: float, return_pv_count: int = 0, return_lse: Optional[bool] = None,
) -> Any:  # fmt: skip
    """Blocks of 128 queries and 64 keys; `value` is `[batch, kv_heads, kv_len, head_dim]` in 16 bits."""
    scales = (query_scale, key_scale)
    _refuse_counts(return_pv_count)
    v = value.to(_computed_in(output))
    lse = _attend(
        query, key, v, output, lut, valid_block_num, scales, tensor_layout, is_causal, qk_quant_gran, sm_scale,
        scheme="sparge-int8-fp16",
    )  # fmt: skip
    return _no_counts(lse, return_lse)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lut: Tensor,
    valid_block_num: Tensor,
    scales: tuple[Tensor, Tensor],
    tensor_layout: int,
    is_causal: int,
    qk_quant_gran: int,
    sm_scale: float,
    sizes: tuple[int, int] = _ELSEWHERE,
    scheme: str = "sparge-int8-fp8",
) -> Tensor:
    """Writes the output, and returns the natural log-sum-exp."""
    if tensor_layout != 1:
        raise NotImplementedError(f"tensor_layout: value is {tensor_layout}, expected 1, HND")
    if qk_quant_gran != 1:
        raise NotImplementedError(f"qk_quant_gran: value is {qk_quant_gran}, expected 1, a scale for each block")
    k_blocks = -(-key.shape[2] // sizes[1])
    rows = [*query.shape[:2], -(-query.shape[2] // sizes[0])]
    if list(lut.shape) != [*rows, k_blocks] or list(valid_block_num.shape) != rows:
        found = f"{list(lut.shape)} and {list(valid_block_num.shape)}"
        raise ValueError(f"lut, valid_block_num: shapes are {found}, expected {[*rows, k_blocks]} and {rows}")
    dtype = _computed_in(output)
    q, k = (
        (integers.float() * per_token(scale, block, integers.shape[2])).to(dtype)
        for integers, scale, block in zip((query, key), scales, sizes)
    )
    asked = request(
        "HND",
        bool(is_causal),
        sm_scale,
        causal_alignment="top_left",
        scheme=scheme_on(query, scheme),
        nearest=True,
        smooth_k=False,
    )
    block_map = listed_map(lut.cumsum(dim=-1), valid_block_num, k_blocks)
    out, lse = dense(q, k, value, asked, block_mask=(block_map, *sizes), return_lse=True)
    output.copy_(out)
    return lse


def _computed_in(output: Tensor) -> torch.dtype:
    """What integers times their scales are computed in: float16 keeps more of them than bfloat16."""
    return torch.float16 if output.is_cuda else torch.float32


def _values_of_fp8(value: Tensor, value_scale: Tensor, key: Tensor, output: Tensor) -> Tensor:
    """V as it was before `spas_sage_attn._fused`, but for what FP8 lost."""
    tokens = value[..., : key.shape[2]].float() * value_scale[..., None]
    return tokens.transpose(2, 3).contiguous().to(_computed_in(output))


def _refuse_counts(return_pv_count: int) -> None:
    if return_pv_count:
        raise NotImplementedError(f"return_pv_count: value is {return_pv_count}, expected 0: nothing is skipped here")


def _no_counts(lse: Tensor, return_lse: Optional[bool]) -> Any:
    """What a kernel that may skip products returns: older callers do not know of a log-sum-exp."""
    counts = lse.new_empty(0)
    if return_lse is None:
        return counts
    return counts, lse / math.log(2.0) if return_lse else counts
