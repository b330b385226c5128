"""Every function and variant, layout, dtype, mask, head grouping and odd shape against attention in float64."""

import pytest
import sageattention
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, attention, int8_scheme, qkv, random

LAYOUTS = ["HND", "NHD"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# (batch, heads, kv_heads, q_len, kv_len, head_dim)
SHAPES = [
    (2, 4, 4, 130, 200, 64),
    (1, 6, 2, 257, 257, 128),
    (2, 4, 1, 65, 321, 72),
    (1, 3, 3, 1, 77, 40),
    (1, 2, 1, 190, 67, 256),
]
MASKS = ["none", "causal", "bool", "additive", "bool+causal"]


def cases(turn):
    """Every shape and every kind of mask once, paired anew at each turn."""
    return [(shape, MASKS[(index + turn) % len(MASKS)]) for index, shape in enumerate(SHAPES)]


FP16 = [
    ("sageattn", {}),
    ("sageattn_qk_int8_pv_fp16_triton", {}),
    ("sageattn_qk_int8_pv_fp16_triton", {"quantization_backend": "cuda"}),
    ("sageattn_qk_int8_pv_fp16_cuda", {}),
    ("sageattn_qk_int8_pv_fp16_cuda", {"qk_quant_gran": "per_warp"}),
    ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp16"}),
    ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp16", "smooth_v": True}),
    ("sageattn_qk_int8_pv_fp16_cuda", {"pv_accum_dtype": "fp16+fp32", "qk_quant_gran": "per_warp"}),
]
FP8 = [
    ("sageattn_qk_int8_pv_fp8_cuda", {}),
    ("sageattn_qk_int8_pv_fp8_cuda", {"qk_quant_gran": "per_warp"}),
    ("sageattn_qk_int8_pv_fp8_cuda", {"pv_accum_dtype": "fp32+fp32"}),
    ("sageattn_qk_int8_pv_fp8_cuda", {"pv_accum_dtype": "fp32", "smooth_v": True}),
    ("sageattn_qk_int8_pv_fp8_cuda_sm90", {}),
    ("sageattn_qk_int8_pv_fp8_cuda_sm90", {"qk_quant_gran": "per_warp"}),
]
VARIANTS = [(*variant, "fp16") for variant in FP16] + [(*variant, "fp8") for variant in FP8]


def name_of(variant):
    return "-".join([variant[0].removeprefix("sageattn_") or "sageattn", *map(str, variant[1].values())])


def a_mask(kind, batch, heads, q_len, kv_len, device, dtype):
    """A mask, broadcast over heads or batch; the first of several queries sees nothing of a boolean one."""
    if kind.startswith("bool"):
        mask = random(batch, 1, q_len, kv_len, seed=7, device=device) > -0.5
        if q_len > 1:
            mask[0, 0, 0] = False
        return mask
    if kind == "additive":
        return random(heads, q_len, kv_len, seed=8, device=device).to(dtype)
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_every_variant_against_float64(device, variant, layout, dtype):
    name, options, values = variant
    turn = VARIANTS.index(variant) * 6 + LAYOUTS.index(layout) * 3 + DTYPES.index(dtype)
    todo = cases(turn)
    if device == "cuda":
        if dtype == torch.float32:
            pytest.skip("float32 on a GPU is an error, tested by itself")
        if values == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("FP8 needs compute capability 8.9")
        # Each case compiles a kernel of its own, so one of them; over the variants all have their turn.
        todo = [todo[turn % len(todo)]] if name != "sageattn" else todo
    for index, (shape, mask_kind) in enumerate(todo):
        label = f"{name} {options} {layout} {dtype} {shape} {mask_kind}"
        batch, heads, _, q_len, kv_len, head_dim = shape
        q, k, v = qkv(*shape, layout=layout, dtype=dtype, device=device, seed=index)
        before = [x.clone() for x in (q, k, v)]
        mask = a_mask(mask_kind, batch, heads, q_len, kv_len, device, dtype)
        causal = mask_kind.endswith("causal")
        scale = 0.7 / head_dim**0.5 if index % 3 == 0 else None
        out, lse = getattr(sageattention, name)(
            q, k, v, tensor_layout=layout, is_causal=causal, sm_scale=scale, attn_mask=mask, return_lse=True, **options
        )  # fmt: skip
        wanted, wanted_lse = attention(
            q, k, v, layout=layout, causal="bottom_right" if causal else None, scale=scale, mask=mask
        )  # fmt: skip
        assert out.dtype == dtype and out.is_contiguous() and out.device == q.device, label
        assert_close(out, wanted, TOLERANCE[values], label)
        assert_lse_close(lse, wanted_lse, label)
        assert all(torch.equal(x, y) for x, y in zip((q, k, v), before)), f"{label}: an input was changed"


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_without_log_sum_exp_the_output_is_the_same(device, variant):
    name, options, values = variant
    if device == "cuda" and values == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    q, k, v = qkv(1, 4, 2, 150, 150, 64, dtype=torch.float16, device=device)
    function = getattr(sageattention, name)
    out = function(q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    assert torch.equal(out, function(q, k, v, return_lse=True, **options)[0])


@pytest.mark.parametrize("head_dim", [1, 3, 8, 31, 64, 80, 96, 128, 129, 160, 192, 255, 256])
def test_any_head_dim_up_to_256(device, head_dim):
    q, k, v = qkv(1, 2, 1, 70, 133, head_dim, dtype=torch.float16, device=device)
    assert_close(sageattention.sageattn(q, k, v), attention(q, k, v)[0], TOLERANCE["fp16"], str(head_dim))


def test_lengths_of_zero_and_one(device):
    q, k, v = qkv(2, 4, 2, 5, 0, 64, dtype=torch.float16, device=device)
    out, lse = sageattention.sageattn(q, k, v, return_lse=True)
    assert not out.any() and torch.isneginf(lse).all()
    q, k, v = qkv(2, 4, 2, 0, 5, 64, dtype=torch.float16, device=device)
    out, lse = sageattention.sageattn(q, k, v, return_lse=True)
    assert out.shape == q.shape and lse.shape == (2, 4, 0)
    q, k, v = qkv(2, 4, 2, 1, 1, 64, dtype=torch.float16, device=device)
    assert_close(sageattention.sageattn(q, k, v), v.double().repeat_interleave(2, dim=1), 1e-3)


def test_views_of_a_fused_projection_are_computed_where_they_lie(device):
    fused = random(2, 140, 3, 4, 64, seed=1, dtype=torch.float16, device=device)
    q, k, v = fused.unbind(2)
    out = sageattention.sageattn(q, k, v, tensor_layout="NHD", is_causal=True)
    packed = sageattention.sageattn(q.contiguous(), k.contiguous(), v.contiguous(), tensor_layout="NHD", is_causal=True)
    assert torch.equal(out, packed)
    # Heads first without a copy, and keys that one batch entry shares with the other.
    heads_first = sageattention.sageattn(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    assert torch.equal(heads_first.transpose(1, 2), out)
    shared = sageattention.sageattn(q, k[:1].expand_as(k), v[:1].expand_as(v), tensor_layout="NHD")
    wanted = sageattention.sageattn(q, k[:1].repeat(2, 1, 1, 1), v[:1].repeat(2, 1, 1, 1), tensor_layout="NHD")
    if device == "cuda":
        # No tensor map repeats a batch entry, so another kernel reads such keys: 16-bit P is rounded twice, 2⁻¹¹ each.
        assert_close(shared, wanted.double(), 1e-3)
    else:
        assert torch.equal(shared, wanted)


def test_channels_that_are_no_neighbours_are_copied(device):
    q, k, v = (x.mT.contiguous().mT for x in qkv(1, 2, 2, 66, 66, 64, dtype=torch.float16, device=device))
    assert q.stride(-1) != 1
    assert torch.equal(sageattention.sageattn(q, k, v), sageattention.sageattn(*(x.contiguous() for x in (q, k, v))))


def test_alignment_window_and_softcap(device):
    q, k, v = qkv(1, 2, 2, 90, 200, 64, dtype=torch.float16, device=device)
    for options, exact in [
        (dict(is_causal=True, causal_alignment="top_left"), dict(causal="top_left")),
        (dict(is_causal=True, window=(40, None)), dict(causal="bottom_right", window=(40, None))),
        (dict(window=(10, 20)), dict(window=(10, 20))),
        (dict(logit_softcap=3.0), dict(softcap=3.0)),
    ]:
        wanted = attention(q, k, v, **exact)[0]
        assert_close(sageattention.sageattn(q, k, v, **options), wanted, TOLERANCE["fp16"], str(options))


def test_full_precision_by_name(device):
    q, k, v = qkv(1, 4, 2, 200, 200, 64, dtype=torch.float16, device=device)
    # The output's own rounding to f16, 2**-11, and on a GPU P's as well.
    assert_close(sageattention.sageattn(q, k, v, scheme="full"), attention(q, k, v)[0], 2e-3)


def test_same_call_same_bits(device):
    q, k, v = qkv(2, 4, 2, 300, 300, 64, dtype=torch.float16, device=device)
    first = sageattention.sageattn(q, k, v, is_causal=True)
    assert all(torch.equal(first, sageattention.sageattn(q, k, v, is_causal=True)) for _ in range(5))


def test_smoothing_is_switched_off_by_our_keyword_alone(device):
    q, k, v = qkv(1, 2, 2, 256, 256, 64, dtype=torch.float16, device=device)
    k = k + 20 * random(64, seed=9, dtype=torch.float16, device=device)
    wanted, wanted_lse = attention(q, k, v)
    # By name: left open, so few keys are not quantised on every device.
    scheme = int8_scheme(device)
    smooth, lse = sageattention.sageattn(q, k, v, scheme=scheme, return_lse=True)
    ignored = sageattention.sageattn(q, k, v, scheme=scheme, smooth_k=False)
    assert torch.equal(smooth, ignored), "ComfyUI's keyword changes nothing"
    rough = sageattention.sageattn(q, k, v, scheme=scheme, smoothing=False)
    assert_close(smooth, wanted, TOLERANCE["fp16"])
    # Scores of several hundreds: f32 sums of them in another order, relative to their size.
    assert (lse.double() - wanted_lse).abs().max() < 2e-3 * wanted_lse.abs().max()
    named = sageattention.sageattn_qk_int8_pv_fp16_cuda(q, k, v, smooth_k=False)
    errors = [((x.double() - wanted).abs().sum() / wanted.abs().sum()).item() for x in (smooth, rough, named)]
    assert errors[1] > 3 * errors[0] and errors[2] > 3 * errors[0], errors


def test_halves_of_the_keys_merge_to_the_whole(device):
    """Ring attention: parts are merged by their log-sum-exp, which must not be that of smoothed scores."""
    q, k, v = qkv(1, 4, 2, 150, 400, 64, dtype=torch.float16, device=device)
    for name, values in [
        ("sageattn", "fp16"),
        ("sageattn_qk_int8_pv_fp16_cuda", "fp16"),
        ("sageattn_qk_int8_pv_fp16_triton", "fp16"),
    ]:
        function = getattr(sageattention, name)
        parts = [
            function(q, k[:, :, half], v[:, :, half], return_lse=True) for half in (slice(0, 130), slice(130, 400))
        ]
        lse = torch.logaddexp(parts[0][1], parts[1][1])
        merged = sum(out.float() * (part - lse).exp()[..., None] for out, part in parts)
        wanted, wanted_lse = attention(q, k, v)
        assert_close(merged, wanted, TOLERANCE[values], name)
        assert_lse_close(lse, wanted_lse, name)
