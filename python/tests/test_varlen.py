"""Packed sequences: each is what it would be by itself."""

import pytest
import sageattention
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, attention, random

LENGTHS_Q = [100, 1, 0, 257, 33]
LENGTHS_K = [100, 50, 9, 300, 0]


def boundaries(lengths, device, dtype):
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(device, dtype, index_dtype, causal):
    q = random(sum(LENGTHS_Q), 6, 64, seed=0, dtype=dtype, device=device)
    k = random(sum(LENGTHS_K), 2, 64, seed=1, dtype=dtype, device=device, bias=2.0)
    v = random(sum(LENGTHS_K), 2, 64, seed=2, dtype=dtype, device=device)
    cu_q, cu_k = (boundaries(lengths, device, index_dtype) for lengths in (LENGTHS_Q, LENGTHS_K))
    arguments = (q, k, v, cu_q, cu_k, max(LENGTHS_Q), max(LENGTHS_K))
    out, lse = sageattention.sageattn_varlen(*arguments, is_causal=causal, return_lse=True)
    assert torch.equal(out, sageattention.sageattn_varlen(*arguments, is_causal=causal))
    assert lse.shape == (6, sum(LENGTHS_Q))
    for b in range(len(LENGTHS_Q)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        wanted, wanted_lse = attention(
            q[None, rows], k[None, keys], v[None, keys], layout="NHD", causal="bottom_right" if causal else None
        )  # fmt: skip
        if LENGTHS_Q[b] == 0:
            continue
        if LENGTHS_K[b] == 0:
            assert not out[rows].any() and torch.isneginf(lse[:, rows]).all()
            continue
        assert_close(out[None, rows], wanted, TOLERANCE["fp16"], f"sequence {b}")
        assert_lse_close(lse[None, :, rows], wanted_lse, f"sequence {b}")


def test_a_sequence_does_not_depend_on_its_neighbours(device):
    """Unlike in the original, K's mean is of each sequence."""
    q, k, v = (random(300, 4, 64, seed=seed, dtype=torch.float16, device=device) for seed in range(3))
    cu = boundaries([128, 172], device, torch.int32)
    before = sageattention.sageattn_varlen(q, k, v, cu, cu, 172, 172)
    k2 = k.clone()
    k2[128:] += 50
    after = sageattention.sageattn_varlen(q, k2, v, cu, cu, 172, 172)
    assert torch.equal(before[:128], after[:128])


def test_wrong_boundaries_are_refused():
    x = random(10, 2, 64, seed=0)
    cu = torch.tensor([0, 10], dtype=torch.int32)
    call = sageattention.sageattn_varlen
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[1\]: value is 9, expected 10, the number of packed rows"):
        call(x, x, x, torch.tensor([0, 9], dtype=torch.int32), cu, 10, 10)
    with pytest.raises(TypeError, match="cu_seqlens_k: dtype is float32, expected int32 or int64"):
        call(x, x, x, cu, cu.float(), 10, 10)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: shape is \[3\], expected \[2\], as cu_seqlens_q"):
        call(x, x, x, cu, torch.tensor([0, 5, 10], dtype=torch.int32), 10, 10)
    with pytest.raises(ValueError, match=r"q: shape is \[1, 10, 2, 64\], expected \[total, heads, head_dim\]"):
        call(x[None], x, x, cu, cu, 10, 10)
    with pytest.raises(NotImplementedError, match="attn_mask: expected None with cu_seqlens"):
        call(x, x, x, cu, cu, 10, 10, attn_mask=torch.ones(10, 10, dtype=torch.bool))
