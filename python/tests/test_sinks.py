"""Attention sinks: a logit of each query head in the softmax's denominator."""

import numpy
import pytest
import torch
from exact import TOLERANCE, attention, qkv, random, relative_l1
from sageattention import sageattn, sageattn_varlen

SINKS = [-2.0, 1.0, 4.0, float("-inf"), 7.0, 30.0]


def with_sinks(out, lse, sinks):
    """The output and log-sum-exp, `[..., heads, rows]`, of exact attention with sinks."""
    joint = torch.logaddexp(lse, sinks.double().expand(lse.shape[:-2] + sinks.shape)[..., None])
    return torch.nan_to_num(out * (lse - joint).exp()[..., None]), joint


def sinks_on(device):
    return torch.tensor(SINKS, device=device)


@pytest.mark.parametrize("scheme", [None, "full", "sage2-int8-fp16-per-thread"])
@pytest.mark.parametrize("causal", [False, True])
def test_sinks_are_exact_attentions(device, scheme, causal):
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = qkv(2, 6, 2, 90, 150, 64, dtype=dtype, device=device)
    out, lse = sageattn(q, k, v, is_causal=causal, scheme=scheme, sinks=sinks_on(device), return_lse=True)
    wanted, wanted_lse = with_sinks(*attention(q, k, v, causal="bottom_right" if causal else None), sinks_on(device))
    assert relative_l1(out, wanted) < TOLERANCE["fp16"]
    assert (lse - wanted_lse).abs().max() < 0.15
    # The last head's sink leaves nothing of it.
    assert out[:, 5].abs().max() < 1e-4
    assert torch.equal(sageattn(q, k, v, is_causal=causal, scheme=scheme, sinks=sinks_on(device)), out)


def test_a_row_without_keys_and_one_query(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = qkv(1, 6, 2, 40, 20, 64, dtype=dtype, device=device)
    out, lse = sageattn(q, k, v, is_causal=True, sinks=sinks_on(device), return_lse=True)
    assert (out[:, :, :20] == 0).all()
    # By logarithms and exponentials that a GPU approximates to 2 in 2^22.
    assert torch.allclose(lse[0, :, 0], sinks_on(device), rtol=1e-6, atol=1e-6)
    q, k, v = qkv(2, 6, 2, 1, 700, 64, dtype=dtype, device=device)
    wanted, _ = with_sinks(*attention(q, k, v), sinks_on(device))
    assert relative_l1(sageattn(q, k, v, sinks=sinks_on(device)), wanted) < TOLERANCE["fp16"]


def test_parts_merge_where_one_of_them_has_the_sinks(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = qkv(1, 6, 2, 30, 100, 64, dtype=dtype, device=device)
    whole, whole_lse = sageattn(q, k, v, scheme="full", sinks=sinks_on(device), return_lse=True)
    first = sageattn(q, k[:, :, :60], v[:, :, :60], scheme="full", sinks=sinks_on(device), return_lse=True)
    second = sageattn(q, k[:, :, 60:], v[:, :, 60:], scheme="full", return_lse=True)
    lse = torch.logaddexp(first[1], second[1])
    merged = sum(out * (part - lse).exp()[..., None] for out, part in (first, second))
    assert relative_l1(merged, whole.double()) < (1e-5 if device == "cpu" else 2e-3)
    assert (lse - whole_lse).abs().max() < 1e-3


def test_packed_sequences(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    q = random(70, 6, 64, seed=1, dtype=dtype, device=device)
    k, v = (random(110, 2, 64, seed=seed, dtype=dtype, device=device) for seed in (2, 3))
    bounds = ([0, 30, 70], [0, 50, 110])
    out, lse = sageattn_varlen(q, k, v, *bounds, 40, 60, is_causal=True, sinks=sinks_on(device), return_lse=True)
    for (q0, q1), (k0, k1) in zip(*(zip(ends, ends[1:]) for ends in bounds)):
        one = (x[None, a:b].transpose(1, 2) for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
        wanted, wanted_lse = with_sinks(*attention(*one, causal="bottom_right"), sinks_on(device))
        assert relative_l1(out[None, q0:q1].transpose(1, 2), wanted) < TOLERANCE["fp16"]
        assert (lse[None, :, q0:q1] - wanted_lse).abs().max() < 0.15


def test_numpy_arrays_and_transformers_name():
    q, k, v = qkv(1, 6, 2, 20, 30, 64)
    wanted = sageattn(q, k, v, sinks=sinks_on("cpu"))
    found = sageattn(*(x.numpy() for x in (q, k, v)), s_aux=numpy.array(SINKS, dtype="float32"))
    assert torch.equal(torch.from_numpy(found), wanted)
    with pytest.raises(NotImplementedError, match="s_aux"):
        from sageattention import sageattn_qk_int8_pv_fp16_cuda

        sageattn_qk_int8_pv_fp16_cuda(q, k, v, s_aux=sinks_on("cpu"))


def test_a_compiled_graph_has_them(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = qkv(1, 6, 2, 40, 50, 64, dtype=dtype, device=device)
    function = torch.compile(
        lambda q, k, v, sinks: sageattn(q, k, v, sinks=sinks) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(function(q, k, v, sinks_on(device)), sageattn(q, k, v, sinks=sinks_on(device)) * 2)


def test_what_is_wrong_is_named(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = qkv(1, 6, 2, 20, 30, 64, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=r"sinks: shape is \[2\], expected \[6\], one for each query head"):
        sageattn(q, k, v, sinks=torch.zeros(2, device=device))
    with pytest.raises(TypeError, match="sinks: dtype is f16, expected f32"):
        sageattn(q, k, v, sinks=torch.zeros(6, device=device, dtype=torch.float16))
    with pytest.raises(TypeError, match="sinks: type is list, expected torch.Tensor, as q"):
        sageattn(q, k, v, sinks=SINKS)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="sinks: requires_grad is True"):
        sageattn(q, k, v, sinks=torch.zeros(6, device=device, requires_grad=True))


def test_a_sink_that_is_no_number_is_named():
    q, k, v = qkv(1, 6, 2, 20, 30, 64)
    with pytest.raises(ValueError, match=r"sinks\[1\]: value is NaN, expected a number, or -inf for none"):
        sageattn(q, k, v, sinks=torch.tensor([0.0, float("nan"), 0.0, 0.0, 0.0, 0.0]))
