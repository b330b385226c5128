"""SpargeAttn's functions, and those of Sparse_SageAttention_API, by the originals' names."""

import inspect
import warnings
from functools import partial

import numpy
import pytest
import spas_sage_attn
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, assert_same, attention, local, qkv, random, visible
from sageattention._block_maps import given_map, sparsity
from sageattention._request import Request
from sageattention.sparse import Predictor, predict_blocks
from sparse_sageattn import sparse_sageattn
from spas_sage_attn import (
    spas_sage2_attn_meansim_cuda,
    spas_sage2_attn_meansim_topk_cuda,
    spas_sage_attn_meansim_cuda,
    spas_sage_attn_meansim_topk_cuda,
)

CDF = [spas_sage2_attn_meansim_cuda, spas_sage_attn_meansim_cuda]
TOPK = [spas_sage2_attn_meansim_topk_cuda, spas_sage_attn_meansim_topk_cuda]


def tensors(device, layout="HND", seed=0):
    dtype = torch.float16 if device == "cuda" else torch.float32
    return local(1, 4, 2, 500, 420, 64, dtype=dtype, device=device, layout=layout, seed=seed, sharp=1.2)


def blocks_of(device):
    """Queries and keys of the original's blocks on a device."""
    hopper = device == "cuda" and torch.cuda.get_device_capability()[0] == 9
    return (64, 128) if hopper else (128, 64)


def predictor_of(device, **options):
    block_q, block_k = blocks_of(device)
    return Predictor.sparge_attn(**options).replace(block_q=block_q, block_k=block_k)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("function", [*CDF, *TOPK], ids=lambda function: function.__name__)
def test_attention_is_over_the_predicted_blocks(device, function, layout, causal):
    q, k, v = tensors(device, layout)
    options = {"cdfthreshd": 0.8, "simthreshd1": 0.1} if function in CDF else {"topk": 0.4, "simthreshd1": -0.1}
    predictor = predictor_of(device, **options)
    alignment = {"is_causal": causal, "causal_alignment": "top_left"}
    blocks = predict_blocks(q, k, predictor, layout, **alignment)
    mask = visible(blocks, *blocks_of(device), 500, 420)
    out, lse, left_out = function(
        q, k, v, is_causal=causal, tensor_layout=layout, return_sparsity=True, return_lse=True, **options
    )
    wanted, wanted_lse = attention(q, k, v, layout=layout, mask=mask, causal="top_left" if causal else None)
    assert_close(out, wanted, TOLERANCE["fp8"])
    assert_lse_close(lse, wanted_lse)
    every = predict_blocks(q, k, predictor_of(device, simthreshd1=1, topk=1), layout, **alignment)
    assert left_out == pytest.approx(1 - blocks.sum().item() / every.sum().item()) and left_out > 0.1
    assert_same(function(q, k, v, is_causal=causal, tensor_layout=layout, **options), out)


def test_sinks_scale_dtype_and_masks(device):
    q, k, v = tensors(device)
    options = {"topk": 0.3, "simthreshd1": -0.1}
    call = partial(spas_sage2_attn_meansim_topk_cuda, q, k, v, **options)
    predictor = predictor_of(device, **options)
    blocks = predict_blocks(q, k, predictor)
    shown = visible(blocks, *blocks_of(device), 500, 420)
    assert_close(call(scale=0.3), attention(q, k, v, mask=shown, scale=0.3)[0], TOLERANCE["fp8"])
    assert call(output_dtype=torch.bfloat16).dtype == torch.bfloat16
    hidden = random(1, 1, 500, 420, seed=5, device=device) > 0
    assert_close(call(attn_mask=hidden), attention(q, k, v, mask=shown & hidden)[0], TOLERANCE["fp8"])
    assert not blocks[..., 0].all()
    blocks[..., 0] = True
    with_sink = visible(blocks, *blocks_of(device), 500, 420)
    assert_close(call(attention_sink=True), attention(q, k, v, mask=with_sink)[0], TOLERANCE["fp8"])
    rough = predict_blocks(q, k, predictor.replace(smooth_k=False))
    found = call(smooth_k=False, return_sparsity=True)
    assert_close(found[0], attention(q, k, v, mask=visible(rough, *blocks_of(device), 500, 420))[0], TOLERANCE["fp8"])


def test_thresholds_are_numbers_lists_or_tensors(device):
    q, k, v = tensors(device)
    shares, similarities = [0.2, 0.4, 0.6, 0.9], [-1.0, -0.5, 0.0, 0.2]
    wanted = spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=shares, simthreshd1=similarities)
    for head in range(4):
        alone = spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=shares[head], simthreshd1=similarities[head])
        assert_same(alone[:, head], wanted[:, head])
    on_device = [torch.tensor(values, device=device) for values in (shares, similarities)]
    found = spas_sage2_attn_meansim_topk_cuda(
        q, k, v, topk=on_device[0], simthreshd1=on_device[1], pvthreshd=torch.full((4,), 50.0, device=device)
    )
    assert_same(found, wanted)
    cdf = spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=None, cdfthreshd=torch.tensor(0.8), simthreshd1=0.1)
    assert_same(cdf, spas_sage2_attn_meansim_cuda(q, k, v, cdfthreshd=0.8, simthreshd1=0.1))


def test_errors():
    q, k, v = local(1, 4, 2, 200, 200, 32)
    for message, function, options in (
        ("topk, cdfthreshd: given are both, expected exactly one", TOPK[0], {"cdfthreshd": 0.9}),
        ("topk, cdfthreshd: given are neither, expected exactly one", TOPK[1], {"topk": None}),
        ("topk, cdfthreshd: given are neither, expected exactly one", CDF[0], {"cdfthreshd": None}),
        ("cdfthreshd: value is 1.5, expected 0 to 1", CDF[1], {"cdfthreshd": 1.5}),
        (r"simthreshd1: shape is \[3\], expected \[4\], one for each query head", CDF[0], {"simthreshd1": [0.1] * 3}),
        (r"pvthreshd: shape is \[2, 2\], expected one number", CDF[0], {"pvthreshd": torch.ones(2, 2)}),
        ("tensor_layout: value is LHD, expected HND or NHD", TOPK[0], {"tensor_layout": "LHD"}),
    ):
        with pytest.raises(ValueError, match=message):
            function(q, k, v, **options)
    with pytest.raises(NotImplementedError, match="dropout_p: value is 0.1, expected 0"):
        TOPK[0](q, k, v, dropout_p=0.1)
    with pytest.raises(
        NotImplementedError, match="topk: value is 0.5, expected None: .*_meansim_cuda does not compute it"
    ):
        CDF[0](q, k, v, topk=0.5)


def test_a_small_pvthreshd_is_warned_of_once(monkeypatch):
    q, k, v = local(1, 4, 2, 200, 200, 32)
    monkeypatch.setattr(spas_sage_attn.core, "_warned_of_pvthreshd", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = spas_sage2_attn_meansim_cuda(q, k, v, pvthreshd=20)
    with pytest.warns(UserWarning, match=r"pvthreshd: value is 15, and products below 2 \*\* -15 are computed"):
        assert torch.equal(
            spas_sage2_attn_meansim_cuda(q, k, v, pvthreshd=torch.tensor([50.0, 15.0, 50.0, 50.0])), wanted
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(spas_sage2_attn_meansim_cuda(q, k, v, pvthreshd=1), wanted)


def test_signatures_are_the_original_s():
    common = "q k v attn_mask=None dropout_p=0.0 is_causal=False scale=None smooth_k=True"
    rest = (
        "pvthreshd=50 attention_sink=False tensor_layout=HND output_dtype=None return_sparsity=False return_lse=False"
    )
    for functions, thresholds in (
        (CDF, "simthreshd1=0.6 cdfthreshd=0.98"),
        (TOPK, "simthreshd1=-0.1 cdfthreshd=None topk=0.5"),
    ):
        for function in functions:
            parameters = inspect.signature(function).parameters.values()
            found = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
            wanted = f"{common} {thresholds} {rest}".split()
            assert found[: len(wanted)] == wanted


def test_no_graph_break(device):
    def model(q, k, v):
        out = spas_sage2_attn_meansim_topk_cuda(2 * q, k, v, topk=0.4, is_causal=True, attention_sink=True)
        return out + spas_sage_attn_meansim_cuda(q, k, v, cdfthreshd=0.8, simthreshd1=[0.1, 0.2, 0.3, 0.4])

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    q, k, v = tensors(device)
    assert torch.equal(compiled(q, k, v), model(q, k, v))


def test_arrays_of_numpy():
    q, k, v = (x.numpy() for x in tensors("cpu"))
    out, left_out = spas_sage2_attn_meansim_topk_cuda(q, k, v, return_sparsity=True, output_dtype="float16")
    assert type(out) is numpy.ndarray and out.dtype == numpy.float16 and left_out > 0.2


def test_sparsity_is_of_what_a_band_shows():
    for options in (
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_alignment": "top_left"},
        {"window_left": 100, "window_right": 30},
    ):
        request = Request(**options)
        mask = torch.ones(300, 410, dtype=torch.bool)
        diagonal = 0 if request.causal_alignment == "top_left" else 110
        right = 0 if request.is_causal else request.window_right
        mask = mask if right is None else mask.tril(diagonal + right)
        mask = mask if request.window_left is None else mask.triu(diagonal - request.window_left)
        seen = torch.nn.functional.max_pool2d(mask[None].float(), (128, 64), ceil_mode=True)[None]
        assert sparsity(seen, 128, 64, 300, [410], request) == 0.0
        seen[..., 0, :] = 0
        assert 0.1 < sparsity(seen, 128, 64, 300, [410], request) < 1


def test_vllm_omni(device):
    q = random(1, 256, 4, 64, seed=0, dtype=torch.float16, device=device)
    out = spas_sage2_attn_meansim_topk_cuda(q, q, q, topk=1.0, tensor_layout="NHD", is_causal=False, scale=None)
    assert_close(out, attention(q, q, q, layout="NHD")[0], TOLERANCE["fp8"])


@pytest.mark.parametrize("causal", [False, True])
def test_sparse_sageattn(device, causal):
    q, k, v = tensors(device)
    blocks = (random(1, 4, 4, 7, seed=11, device=device) > 0).to(torch.int8)
    blocks[0, 0, 1] = 0
    out, lse = sparse_sageattn(q, k, v, blocks, causal, return_lse=True)
    wanted, wanted_lse = attention(
        q, k, v, mask=visible(blocks, 128, 64, 500, 420), causal="top_left" if causal else None
    )
    assert_close(out, wanted, TOLERANCE["fp16"])
    assert_lse_close(lse, wanted_lse)
    assert not out[0, 0, 128:256].any() and torch.isneginf(lse[0, 0, 128:256]).all()
    heads_last = sparse_sageattn(*(x.transpose(1, 2) for x in (q, k, v)), blocks, is_causal=causal, tensor_layout="NHD")
    assert_same(heads_last.transpose(1, 2), out)
    assert_close(sparse_sageattn(q, k, v), attention(q, k, v)[0], TOLERANCE["fp16"])
    with pytest.raises(
        ValueError, match=r"mask_id: shape is \[1, 4, 8, 4\], expected \[batch, heads, 4, 7\] \(blocks of 128 x 64\)$"
    ):
        sparse_sageattn(q, k, v, torch.ones(1, 4, 8, 4, dtype=torch.int8, device=device))


def test_a_map_that_fits_both_ways_is_of_the_first_size():
    x = random(1, 2, 64, 64, seed=0)
    blocks = torch.ones(1, 2, 1, 1)
    for sizes in ([(64, 128), (128, 64)], [(128, 64), (64, 128)]):
        assert given_map(x, x, blocks, "HND", sizes)[1:] == sizes[0]


def test_block_sparse(device):
    q, k, v = qkv(1, 4, 2, 300, 260, 64, dtype=torch.float16, device=device)
    blocks = (random(1, 4, 3, 5, seed=11, device=device) > 0).to(torch.int8)
    blocks[0, 0, 1] = 0
    call = partial(spas_sage_attn.block_sparse_sage2_attn_cuda, q, k, v, mask_id=blocks)
    shown = visible(blocks, 128, 64, 300, 260)
    out, sparsity = call(return_sparsity=True)
    assert_close(out, attention(q, k, v, mask=shown)[0], TOLERANCE["fp8"])
    assert not out[0, 0, 128:256].any()
    assert sparsity == pytest.approx(1 - blocks.sum().item() / blocks.numel())
    shown[..., :64] = True
    assert_close(call(attention_sink=True), attention(q, k, v, mask=shown)[0], TOLERANCE["fp8"])
    assert call(output_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert not blocks[0, 0, 1].any(), "the caller's map was changed"


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_map_of_hopper_s_blocks(layout):
    q, k, v = qkv(1, 4, 2, 300, 260, 64, dtype=torch.float16, layout=layout)
    blocks = (random(1, 4, 5, 3, seed=12) > 0).to(torch.int8)
    shown = visible(blocks, 64, 128, 300, 260)
    call = partial(spas_sage_attn.block_sparse_sage2_attn_cuda, q, k, v, tensor_layout=layout)
    out, lse, sparsity = call(blocks, return_lse=True, return_sparsity=True)
    wanted, wanted_lse = attention(q, k, v, mask=shown, layout=layout)
    assert_close(out, wanted, TOLERANCE["fp8"])
    assert_lse_close(lse, wanted_lse)
    assert sparsity == pytest.approx(1 - blocks.sum().item() / blocks.numel())
    causal = attention(q, k, v, mask=shown, layout=layout, causal="bottom_right")[0]
    assert_close(call(blocks, causal=True), causal, TOLERANCE["fp8"])
    for shape in ((1, 4, 3, 3), (1, 4, 5, 5)):
        with pytest.raises(
            ValueError, match=r"mask_id: shape is .*, expected \[batch, heads, 3, 5\] \(blocks of 128 x 64\) or"
        ):
            call(torch.ones(shape, dtype=torch.int8))


def test_maps_of_other_libraries_types_and_devices():
    q = random(1, 2, 70, 64, seed=0).numpy()
    blocks = numpy.ones((1, 2, 1, 2), dtype=bool)
    assert spas_sage_attn.block_sparse_sage2_attn_cuda(q, q, q, blocks, output_dtype="float16").dtype == numpy.float16
    with pytest.raises(TypeError, match="mask_id: type is list, expected a tensor"):
        spas_sage_attn.block_sparse_sage2_attn_cuda(q, q, q, [[1, 1]])
    x = torch.from_numpy(q)
    with pytest.raises(ValueError, match="mask_id: device is meta, expected cpu, as q"):
        spas_sage_attn.block_sparse_sage2_attn_cuda(x, x, x, torch.ones(1, 2, 1, 2, device="meta"))
