"""What no query sees must not count, whatever K and V hold there."""

import math

import pytest
import sageattention
import torch
from exact import attention, qkv, random, relative_l1
from sageattention import sageattn

# The device's own choice, K quantised by blocks of keys or by each, and 16-bit scores.
SCHEMES = [None, "int8", "int8-per-token", "int8-per-token-rotated", "full"]


def schemes(device):
    return [*SCHEMES, "int8-fp8"] if device == "cuda" and torch.cuda.get_device_capability() >= (8, 9) else SCHEMES


def dtype_of(device):
    return torch.float16 if device == "cuda" else torch.float32


def as_exact_as(found, sliced, wanted, label):
    """The same keys have the same mean and scales: what differs is the order of sums, and where a tile's keys begin."""
    errors = [relative_l1(out, wanted) for out in (found, sliced)]
    assert errors[0] <= 1.05 * errors[1] + 1e-4, f"{label}: {errors[0]:.4f}, sliced {errors[1]:.4f}"


@pytest.mark.parametrize("hidden", [30.0, 1e3, 6e4, 1e10, math.inf, math.nan])
def test_padding_behind_a_boolean_mask(device, hidden):
    dtype = dtype_of(device)
    for length in (256, 1500):
        q, k, v = qkv(2, 4, 2, 256, length, 64, dtype=dtype, device=device)
        end = length - 56
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool, device=device)
        mask[..., end:] = False
        wanted, _ = attention(q, k[:, :, :end], v[:, :, :end])
        bias = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, -math.inf)
        for scheme in schemes(device):
            sliced = sageattn(q, k[:, :, :end], v[:, :, :end], scheme=scheme)
            spoiled = k.clone(), v.clone()
            for tensor in spoiled:
                tensor[:, :, end + 10 :] = hidden
            for attn_mask in (mask, bias, mask.expand(2, 4, 256, length).contiguous()):
                out = sageattn(q, *spoiled, attn_mask=attn_mask, scheme=scheme)
                as_exact_as(out, sliced, wanted, f"{scheme}, {length} keys, {hidden}, {attn_mask.dtype}")


@pytest.mark.parametrize(("bias", "slots"), [(10.0, 512), (10.0, 4096), (30.0, 4096)])
def test_a_static_cache_is_as_exact_as_its_filled_slots(device, bias, slots):
    dtype = dtype_of(device)
    q = random(1, 8, 64, 128, seed=1, dtype=dtype, device=device)
    k, v = (torch.zeros(1, 2, slots, 128, dtype=dtype, device=device) for _ in range(2))
    k[:, :, :256] = random(1, 2, 256, 128, seed=2, dtype=dtype, device=device, bias=bias)
    v[:, :, :256] = random(1, 2, 256, 128, seed=3, dtype=dtype, device=device)
    wanted, _ = attention(q, k[:, :, :256], v[:, :, :256])
    lowest = torch.finfo(dtype).min
    mask = torch.arange(slots, device=device)[None, None, None, :] < 256
    padding = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, lowest)
    # Left open, few keys are not quantised on some GPUs, and all slots of a cache are many.
    for scheme in schemes(device)[1:]:
        sliced = sageattn(q, k[:, :, :256], v[:, :, :256], scheme=scheme)
        for attn_mask in (mask, padding):
            out = sageattn(q, k, v, attn_mask=attn_mask, scheme=scheme)
            as_exact_as(out, sliced, wanted, f"{scheme}, {slots} slots, {attn_mask.dtype}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_of_padding_is_what_pytorch_gives(device, dtype, mask_dtype):
    """transformers fill the rows of padding in a left-padded batch with the least finite number."""
    for length in (130, 1500):
        q, k, v = qkv(1, 4, 2, length, length, 64, dtype=dtype, device=device)
        mask = torch.zeros(1, 1, length, length, dtype=mask_dtype, device=device)
        mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).triu(1), torch.finfo(mask_dtype).min)
        mask[..., :20] = torch.finfo(mask_dtype).min
        mask[..., :20, :] = torch.finfo(mask_dtype).min
        wanted, _ = attention(q, k, v, mask=mask.float())
        for scheme in schemes(device):
            out = sageattn(q, k, v, attn_mask=mask, scheme=scheme)
            # In half precision a score is not lost beside its bias: exact attention weighs the keys by it.
            mean = relative_l1(out[:, :, :20], wanted[:, :, :20])
            bound = 0.05 if scheme == "int8-fp8" else 0.02
            assert mean <= (0.1 if mask_dtype == torch.float16 else bound), f"{scheme}, {length}: {mean}"
            others = relative_l1(out[:, :, 20:], wanted[:, :, 20:])
            assert others <= bound, f"{scheme}, {length}: {others}"


@pytest.mark.parametrize("hidden", [6e4, math.nan])
def test_keys_beyond_the_causal_band(device, hidden):
    """PyTorch's causal mask: the first query sees the first key, and keys behind the last query's are seen by none."""
    dtype = dtype_of(device)
    for q_len, length in ((100, 300), (1100, 2300)):
        q, k, v = qkv(2, 4, 4, q_len, length, 64, dtype=dtype, device=device)
        wanted, _ = attention(q, k, v, causal="top_left")
        for scheme in schemes(device):
            sliced = sageattn(q, k[:, :, :q_len], v[:, :, :q_len], is_causal=True, scheme=scheme)
            spoiled = k.clone(), v.clone()
            for tensor in spoiled:
                tensor[:, :, q_len:] = hidden
            out = sageattn(q, *spoiled, is_causal=True, causal_alignment="top_left", scheme=scheme)
            as_exact_as(out, sliced, wanted, f"{scheme}, {q_len} × {length}")
            with sageattention.patched(scheme):
                out = torch.nn.functional.scaled_dot_product_attention(q, *spoiled, is_causal=True)
            as_exact_as(out, sliced, wanted, f"patched, {scheme}, {q_len} × {length}")


def test_blocks_that_a_map_leaves_out():
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    q, k, v = qkv(1, 2, 2, 300, 300, 64)
    blocks = torch.ones(1, 2, 3, 5, dtype=torch.int8)
    blocks[..., 2] = 0
    kept = torch.ones(300, dtype=torch.bool)
    kept[128:192] = False
    wanted, _ = attention(q, k[:, :, kept], v[:, :, kept])
    # They still enter means and scales, as a map says what is computed: zeros change these hardly, and a sum much. FP8
    # values are off by 0.037.
    k[:, :, 128:192] = v[:, :, 128:192] = 0.0
    assert relative_l1(block_sparse_sage2_attn_cuda(q, k, v, mask_id=blocks), wanted) <= 0.045


@pytest.mark.parametrize(("of_q", "of_k", "of_v"), [(1e-37, 1e37, 1.0), (1e37, 1e-37, 1.0), (1.0, 1.0, 1e-36)])
def test_the_whole_range_of_single_precision(of_q, of_k, of_v):
    q, k, v = qkv(1, 4, 2, 100, 300, 64)
    q, k, v = q * of_q, k * of_k, v * of_v
    wanted, _ = attention(q, k, v)
    for scheme in SCHEMES:
        out = sageattn(q, k, v, scheme=scheme)
        assert torch.isfinite(out).all()
        assert relative_l1(out, wanted) <= 0.02, scheme
