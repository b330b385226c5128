"""Attention sinks: a logit of each query head in the softmax's denominator."""

import numpy
import pytest
import torch
from exact import TOLERANCE, attention, local, qkv, random, relative_l1, visible
from sageattention import sageattn, sageattn_varlen
from sageattention.sparse import Predictor, predict_blocks, sparse_attention
from sparse_sageattn import sparse_sageattn
from spas_sage_attn import (
    block_sparse_sage2_attn_cuda,
    spas_sage2_attn_meansim_cuda,
    spas_sage2_attn_meansim_topk_cuda,
    spas_sage_attn_meansim_cuda,
    spas_sage_attn_meansim_topk_cuda,
)
from test_keywords import DENSE

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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_every_function_has_them(device, name, causal):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    q, k, v = qkv(2, 6, 2, 90, 150, 64, dtype=torch.float16 if device == "cuda" else torch.float32, device=device)
    wanted, wanted_lse = with_sinks(*attention(q, k, v, causal="bottom_right" if causal else None), sinks_on(device))
    for spelling in ("sinks", "s_aux"):
        options = {spelling: sinks_on(device), "is_causal": causal, "return_lse": True}
        out, lse = DENSE[name](q, k, v, **options)
        assert relative_l1(out, wanted) < TOLERANCE["fp8"]
        assert (lse - wanted_lse).abs().max() < 0.15
        assert out[:, 5].abs().max() < 1e-4


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


PREDICTING = [
    spas_sage2_attn_meansim_cuda,
    spas_sage2_attn_meansim_topk_cuda,
    spas_sage_attn_meansim_cuda,
    spas_sage_attn_meansim_topk_cuda,
]


def block_tensors(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    return local(1, 6, 2, 500, 420, 64, dtype=dtype, device=device, sharp=1.2)


def original_blocks(device):
    """Queries and keys of the original's blocks on a device."""
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    return (64, 128) if hopper else (128, 64)


def check_over_blocks(found, q, k, v, blocks, sizes, device):
    """A pair of output and log-sum-exp against exact attention of a map's blocks with sinks."""
    shown = visible(blocks, *sizes, q.shape[2], k.shape[2])
    assert 0 < blocks.float().mean() < 0.9, "a map of all blocks tells nothing"
    wanted, wanted_lse = with_sinks(*attention(q, k, v, mask=shown), sinks_on(device))
    out, lse = found
    assert relative_l1(out, wanted) < TOLERANCE["fp8"]
    assert (lse - wanted_lse).abs().max() < 0.15
    assert out[:, 5].abs().max() < 1e-4


@pytest.mark.parametrize("function", PREDICTING, ids=lambda function: function.__name__)
def test_functions_that_predict_blocks_have_them(device, function):
    q, k, v = block_tensors(device)
    options = {"topk": 0.4} if "topk" in function.__name__ else {"cdfthreshd": 0.8}
    sizes = original_blocks(device)
    predictor = Predictor.sparge_attn(simthreshd1=-0.1, **options).replace(block_q=sizes[0], block_k=sizes[1])
    blocks = predict_blocks(q, k, predictor)
    found = function(q, k, v, simthreshd1=-0.1, sinks=sinks_on(device), return_lse=True, **options)
    check_over_blocks(found, q, k, v, blocks, sizes, device)


def test_functions_that_are_given_blocks_have_them(device):
    q, k, v = block_tensors(device)
    blocks = predict_blocks(q, k, Predictor.sla(0.4).replace(block_q=128))
    found = sparse_sageattn(q, k, v, blocks, sinks=sinks_on(device), return_lse=True)
    check_over_blocks(found, q, k, v, blocks, (128, 64), device)
    sizes = original_blocks(device)
    blocks = predict_blocks(q, k, Predictor.sla(0.4).replace(block_q=sizes[0], block_k=sizes[1]))
    found = block_sparse_sage2_attn_cuda(q, k, v, blocks, s_aux=sinks_on(device), return_lse=True)
    check_over_blocks(found, q, k, v, blocks, sizes, device)


def test_predicted_blocks_and_pooled_terms_have_them(device):
    q, k, v = block_tensors(device)
    predictor = Predictor.sla(0.4)
    options = {"return_lse": True, "return_map": True}
    *found, blocks = sparse_attention(q, k, v, predictor, sinks=sinks_on(device), **options)
    check_over_blocks(found, q, k, v, blocks, (64, 64), device)
    # What a tail adds is in the sum as well: as much more of the output, as the log-sum-exp says.
    tail, tail_lse, _ = sparse_attention(q, k, v, predictor, pooled_tail=True, **options)
    wanted, wanted_lse = with_sinks(tail.double(), tail_lse.double(), sinks_on(device))
    out, lse, _ = sparse_attention(q, k, v, predictor, pooled_tail=True, sinks=sinks_on(device), **options)
    assert relative_l1(out, wanted) < 2e-3 and (lse - wanted_lse).abs().max() < 1e-3
    if device == "cpu":
        given = (x.numpy() for x in (q, k, v))
        arrays = sparse_attention(*given, predictor, s_aux=numpy.array(SINKS, dtype="float32"))
        assert torch.equal(torch.from_numpy(arrays), found[0])


def test_a_compiled_sparse_graph_has_them(device):
    q, k, v = block_tensors(device)
    function = torch.compile(
        lambda q, k, v, sinks: sparse_attention(q, k, v, Predictor.sla(0.4), sinks=sinks) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    wanted = sparse_attention(q, k, v, Predictor.sla(0.4), sinks=sinks_on(device)) * 2
    assert torch.equal(function(q, k, v, sinks_on(device)), wanted)


def test_numpy_arrays_and_transformers_name():
    q, k, v = qkv(1, 6, 2, 20, 30, 64)
    wanted = sageattn(q, k, v, sinks=sinks_on("cpu"))
    found = sageattn(*(x.numpy() for x in (q, k, v)), s_aux=numpy.array(SINKS, dtype="float32"))
    assert torch.equal(torch.from_numpy(found), wanted)


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
    with pytest.raises(TypeError, match="sinks: type is list, expected torch.Tensor, as q"):
        spas_sage2_attn_meansim_cuda(q, k, v, sinks=SINKS)
    with pytest.raises(ValueError, match=r"sinks: shape is \[2\], expected \[6\], one for each query head"):
        sparse_attention(q, k, v, Predictor.sla(0.5), sinks=torch.zeros(2, device=device))
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="sinks: requires_grad is True"):
        sageattn(q, k, v, sinks=torch.zeros(6, device=device, requires_grad=True))


def test_a_sink_that_is_no_number_is_named():
    q, k, v = qkv(1, 6, 2, 20, 30, 64)
    with pytest.raises(ValueError, match=r"sinks\[1\]: value is NaN, expected a number, or -inf for none"):
        sageattn(q, k, v, sinks=torch.tensor([0.0, float("nan"), 0.0, 0.0, 0.0, 0.0]))
