"""Packed sequences: each is what it would be by itself."""

import numpy
import pytest
import sageattention
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, attention, int8_scheme, random

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
    # By name: left open, so few keys are not quantised on every device, and there is no mean.
    options = {"scheme": int8_scheme(device)}
    before = sageattention.sageattn_varlen(q, k, v, cu, cu, 172, 172, **options)
    k2 = k.clone()
    k2[128:] += 50
    after = sageattention.sageattn_varlen(q, k2, v, cu, cu, 172, 172, **options)
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
    with pytest.raises(
        NotImplementedError, match="attn_mask: value is Tensor, expected None: sageattn_varlen does not compute it"
    ):
        call(x, x, x, cu, cu, 10, 10, attn_mask=torch.ones(10, 10, dtype=torch.bool))


def test_windows_soft_caps_and_alignments_of_packed_sequences(device):
    q = random(sum(LENGTHS_Q), 4, 64, seed=0, dtype=torch.float16, device=device)
    k = random(sum(LENGTHS_K), 2, 64, seed=1, dtype=torch.float16, device=device, bias=2.0)
    v = random(sum(LENGTHS_K), 2, 64, seed=2, dtype=torch.float16, device=device)
    cu_q, cu_k = (boundaries(lengths, device, torch.int32) for lengths in (LENGTHS_Q, LENGTHS_K))
    for options, exact in [
        (dict(window=(20, 5)), dict(window=(20, 5))),
        (dict(is_causal=True, window_size=[30, -1]), dict(causal="bottom_right", window=(30, None))),
        (dict(logit_softcap=3.0), dict(softcap=3.0)),
        (dict(causal=True, causal_alignment="top_left", softcap=3.0), dict(causal="top_left", softcap=3.0)),
    ]:
        out = sageattention.sageattn_varlen(q, k, v, cu_q, cu_k, max(LENGTHS_Q), max(LENGTHS_K), **options)
        for b, (q_len, kv_len) in enumerate(zip(LENGTHS_Q, LENGTHS_K)):
            if q_len == 0 or kv_len == 0:
                continue
            rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
            wanted, _ = attention(q[None, rows], k[None, keys], v[None, keys], layout="NHD", **exact)
            if wanted.any():
                assert_close(out[None, rows], wanted, TOLERANCE["fp16"], f"{options}, sequence {b}")
            else:
                assert not out[rows].any()


def test_lists_of_boundaries_and_lengths_left_open(device):
    x = random(100, 2, 64, seed=0, dtype=torch.float16, device=device)
    cu = boundaries([40, 60], device, torch.int32)
    wanted = sageattention.sageattn_varlen(x, x, x, cu, cu, 60, 60, is_causal=True)
    numbers = {"max_seqlen_q": numpy.int64(60), "max_seqlen_k": torch.tensor(60)}
    for boundary, lengths in [
        ([0, 40, 100], {"max_seqlen_q": 60, "max_seqlen_k": 60}),
        (cu, {"max_seqlen_q": None, "max_seqlen_k": None}),
        ((0, 40, 100), {"max_seqlen_q": None, "max_seqlen_k": 60}),
        (cu, numbers),
    ]:
        arguments = {"cu_seqlens_q": boundary, "cu_seqlens_k": boundary, **lengths}
        assert torch.equal(sageattention.sageattn_varlen(x, x, x, **arguments, is_causal=True), wanted)
    arrays = [x.float().cpu().numpy()] * 3
    packed = sageattention.sageattn_varlen(*arrays, [0, 40, 100], [0, 40, 100], None, None)
    assert packed.shape == (100, 2, 64)

    def compiled(x, cu):
        return sageattention.sageattn_varlen(x, x, x, cu, cu, None, None, is_causal=True)

    # What is traced has no values to look at: all rows bound the lengths then, for which a GPU may take another kernel.
    found = torch.compile(compiled, backend="aot_eager", fullgraph=True)(x, cu)
    assert (found - wanted).abs().max() <= 2e-3


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "max_seqlen_q: value is 10.0, of type float, expected an integer", {"max_seqlen_q": 10.0}),
        (TypeError, "max_seqlen_k: value is True, of type bool, expected an integer", {"max_seqlen_k": True}),
        (ValueError, "max_seqlen_k: value is -1, expected 0 to", {"max_seqlen_k": -1}),
        (TypeError, "cu_seqlens_q: type is int, expected torch.Tensor or a list", {"cu_seqlens_q": 10}),
        (TypeError, "cu_seqlens_q: type is ndarray, expected torch.Tensor", {"cu_seqlens_q": numpy.array([0, 10])}),
        (TypeError, r"cu_seqlens_k\[1\]: value is 10.0, of type float", {"cu_seqlens_k": [0, 10.0]}),
        (TypeError, r"cu_seqlens_k\[1\]: value is \[10\], of type list", {"cu_seqlens_k": [0, [10]]}),
        (ValueError, r"cu_seqlens_k: shape is \[0\], expected \[batch \+ 1\]", {"cu_seqlens_k": []}),
        (ValueError, r"cu_seqlens_k\[1\]: value is 4294967306, expected at most", {"cu_seqlens_k": [0, 2**32 + 10]}),
        (NotImplementedError, "attn_mask: value is Tensor, expected None", {"attn_mask": torch.ones(10, 10)}),
    ],
)
def test_messages_of_packed_calls(error, message, arguments):
    x = random(10, 2, 64, seed=0)
    cu = torch.tensor([0, 10], dtype=torch.int32)
    call = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=10, max_seqlen_k=10)
    with pytest.raises(error, match=message):
        sageattention.sageattn_varlen(x, x, x, **{**call, **arguments})


def test_wide_boundaries_are_not_taken_modulo_two_to_the_32():
    x = random(10, 2, 64, seed=0).numpy()
    wide, narrow = numpy.array([0, 2**32 + 10]), numpy.array([0, 10])
    with pytest.raises(ValueError, match="cu_seqlens_q: value is 4294967306, expected at most 2147483647"):
        sageattention.sageattn_varlen(x, x, x, wide, narrow, 10, 10)
    assert sageattention.sageattn_varlen(x, x, x, narrow, narrow, 10, 10).shape == x.shape
