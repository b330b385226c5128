"""The original's kernels as SageSLA calls them."""

import math

import pytest
import spas_sage_attn._fused as fused
import spas_sage_attn._qattn as qattn
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, attention, local, random, visible
from spas_sage_attn.utils import block_map_lut_triton, get_vanilla_qk_quant

FP8 = "qk_int8_sv_f8_accum_f32_block_sparse_attn_inst_buf_fuse_v_scale"


def tensors(device, sizes):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = local(1, 4, 2, 300, 410, 64, dtype=dtype, device=device, sharp=1.2)
    blocks = random(1, 4, -(-300 // sizes[0]), -(-410 // sizes[1]), seed=3, device=device) > 0
    blocks[0, 0, 1] = False
    k_mean = k.mean(dim=-2, keepdim=True)
    integers = get_vanilla_qk_quant(q, k, k_mean, *sizes)
    return q, k, v, k_mean, blocks, integers, block_map_lut_triton(blocks)


def values(v):
    batch, heads, kv_len, head_dim = v.shape
    side_by_side = torch.empty(batch, heads, head_dim, -(-kv_len // 128) * 128, dtype=v.dtype, device=v.device)
    fused.transpose_pad_permute_cuda(v, side_by_side, 1)
    v_fp8 = torch.empty(side_by_side.shape, dtype=torch.float8_e4m3fn, device=v.device)
    v_scale = torch.empty(batch, heads, head_dim, dtype=torch.float32, device=v.device)
    fused.scale_fuse_quant_cuda(side_by_side, v_fp8, v_scale, kv_len, 2.25, 1)
    return v_fp8, v_scale


@pytest.mark.parametrize("sizes", [(64, 128), (128, 64)])
def test_values_in_fp8(device, sizes):
    q, k, v, k_mean, blocks, (q_int8, q_scale, k_int8, k_scale), lists = tensors(device, sizes)
    v_fp8, v_scale = values(v)
    suffix = "_sm90" if sizes == (64, 128) else ""
    wanted, wanted_lse = attention(q, k - k_mean, v, mask=visible(blocks, *sizes, 300, 410))
    out = torch.empty_like(q)
    rest = (q_scale, k_scale, v_scale, 1, False, 1, 64**-0.5)
    assert getattr(qattn, f"{FP8}{suffix}")(q_int8, k_int8, v_fp8, out, *lists, *rest) is None
    # FP8 of V twice.
    assert_close(out, wanted, 1.5 * TOLERANCE["fp8"])
    kernel = getattr(qattn, f"{FP8}_with_pv_threshold{suffix}")
    threshold = torch.full((4,), 1e6, device=device)
    again = torch.empty_like(q)
    assert kernel(q_int8, k_int8, v_fp8, again, *lists, threshold, *rest, 0).numel() == 0
    assert torch.equal(again, out)
    _, lse = kernel(q_int8, k_int8, v_fp8, again, *lists, threshold, *rest, 0, True)
    assert_lse_close(lse * math.log(2), wanted_lse)


def test_values_in_16_bits(device):
    sizes = (128, 64)
    q, k, v, k_mean, blocks, (q_int8, q_scale, k_int8, k_scale), lists = tensors(device, sizes)
    out = torch.empty_like(q)
    kernel = qattn.qk_int8_sv_f16_accum_f16_block_sparse_attn_inst_buf_with_pv_threshold
    threshold = torch.full((4,), 1e6, device=device)
    kernel(q_int8, k_int8, v.half(), out, *lists, threshold, q_scale, k_scale, 1, 1, 1, 64**-0.5, 0)
    wanted, _ = attention(q, k, v, mask=visible(blocks, *sizes, 300, 410), causal="top_left")
    assert_close(out, wanted, TOLERANCE["fp16"])
    for error, changed in (("tensor_layout: value is 0", (0, 1, 1)), ("qk_quant_gran: value is 2", (1, 1, 2))):
        with pytest.raises(NotImplementedError, match=error):
            kernel(q_int8, k_int8, v.half(), out, *lists, threshold, q_scale, k_scale, *changed, 0.125, 0)
    with pytest.raises(NotImplementedError, match="return_pv_count: value is 1"):
        kernel(q_int8, k_int8, v.half(), out, *lists, threshold, q_scale, k_scale, 1, 1, 1, 0.125, 1)
    with pytest.raises(
        ValueError, match=r"lut, valid_block_num: shapes are .*, expected \[1, 4, 3, 7\] and \[1, 4, 3\]"
    ):
        kernel(q_int8, k_int8, v.half(), out, lists[0][:, :, 1:], lists[1], threshold, q_scale, k_scale, 1, 1, 1, 0.125)


def test_lists_are_steps_from_block_to_block():
    lut, number = block_map_lut_triton(torch.tensor([[[[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 1]]]]))
    assert lut.tolist() == [[[[1, 2, 1, 0, 0], [0, 0, 0, 0, 0], [0, 4, 0, 0, 0]]]] and lut.dtype == torch.int32
    assert number.tolist() == [[[3, 0, 2]]] and number.dtype == torch.int32
    with pytest.raises(ValueError, match=r"block_map: shape is \[2, 2\], expected \[batch, heads"):
        block_map_lut_triton(torch.ones(2, 2))


def test_quantised_blocks_are_within_half_a_step():
    q, k, _ = local(2, 4, 2, 130, 70, 32)
    mean = k.mean(dim=2, keepdim=True)
    q_int8, q_scale, k_int8, k_scale = get_vanilla_qk_quant(q, k, mean)
    assert q_scale.shape == (2, 4, 2) and k_scale.shape == (2, 2, 2) and q_int8.dtype == torch.int8
    found = k_int8 * k_scale.repeat_interleave(64, dim=-1)[..., :70, None]
    steps = k_scale.repeat_interleave(64, dim=-1)[..., :70, None]
    assert ((found - (k - mean)).abs() <= 0.5001 * steps).all()
    zero, scale, _, _ = get_vanilla_qk_quant(torch.zeros(1, 1, 5, 8), k)
    assert not zero.any() and torch.isfinite(scale).all()
