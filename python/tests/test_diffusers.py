"""diffusers from PyPI, untouched: its sage backends with tiny random transformers."""

import pytest
import sageattention
import torch
from exact import TOLERANCE, assert_close, attention, random, relative_l1

diffusers = pytest.importorskip("diffusers")

BACKENDS = [
    "sage",
    "sage_varlen",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
]


def wan(device, dtype):
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=16, ffn_dim=128, num_layers=2, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(1, 4, 3, 16, 16, seed=0, dtype=dtype, device=device),
        timestep=torch.tensor([500], device=device),
        encoder_hidden_states=random(1, 12, 32, seed=1, dtype=dtype, device=device),
    )
    return model.to(device=device, dtype=dtype).eval(), inputs


def flux(device, dtype):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(1, 144, 4, seed=0, dtype=dtype, device=device),
        encoder_hidden_states=random(1, 20, 32, seed=1, dtype=dtype, device=device),
        pooled_projections=random(1, 32, seed=2, dtype=dtype, device=device),
        timestep=torch.tensor([0.5], device=device, dtype=dtype),
        img_ids=torch.zeros(144, 3, device=device, dtype=dtype),
        txt_ids=torch.zeros(20, 3, device=device, dtype=dtype),
    )
    return model.to(device=device, dtype=dtype).eval(), inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("build", [wan, flux])
def test_backend(device, build, backend):
    if device == "cuda" and "fp8" in backend and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    model, inputs = build(device, torch.bfloat16)
    model.set_attention_backend("native")
    wanted = model(**inputs).sample
    model.set_attention_backend(backend)
    found = model(**inputs).sample
    assert not torch.equal(found, wanted), "the backend was not used"
    # Two bf16 models, whose attention differs by 0.012 (INT8) or 0.037 (FP8) of itself.
    assert relative_l1(found, wanted.double()) < 0.05


def test_it_is_found_with_the_version_that_diffusers_asks_for():
    from diffusers.utils import is_sageattention_available, is_sageattention_version

    assert is_sageattention_available() and is_sageattention_version(">=", "2.1.1")


def sd3(device, dtype):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    inputs = dict(
        hidden_states=random(1, 4, 16, 16, seed=0, dtype=dtype, device=device),
        encoder_hidden_states=random(1, 12, 32, seed=1, dtype=dtype, device=device),
        pooled_projections=random(1, 32, seed=2, dtype=dtype, device=device),
        timestep=torch.tensor([500], device=device),
    )
    return model.to(device=device, dtype=dtype).eval(), inputs


def test_patch_reaches_models_that_ignore_the_backend(device):
    """Why README has patch() first: some models call torch's function themselves."""
    model, inputs = sd3(device, torch.bfloat16)
    wanted = model(**inputs).sample
    sageattention.counts(reset=True)
    model.set_attention_backend("sage")
    assert torch.equal(model(**inputs).sample, wanted) and sageattention.counts() == (0, {}), "it has an effect now"
    model.set_attention_backend("native")
    with sageattention.patched():
        found = model(**inputs).sample
    assert sageattention.counts() == (2, {})
    assert not torch.equal(found, wanted) and relative_l1(found, wanted.double()) < 0.05


def test_patch_takes_masks_that_the_backend_refuses(device):
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    q, k, v = (random(1, 30, 2, 64, seed=n, dtype=torch.bfloat16, device=device) for n in range(3))
    mask = random(1, 1, 30, 30, seed=3, device=device) > -0.5
    with pytest.raises(ValueError, match="attn_mask"):
        dispatch_attention_fn(q, k, v, attn_mask=mask, backend="sage")
    sageattention.counts(reset=True)
    with sageattention.patched():
        found = dispatch_attention_fn(q, k, v, attn_mask=mask, backend="native")
    assert sageattention.counts() == (1, {})
    assert_close(found, attention(q, k, v, layout="NHD", mask=mask)[0], TOLERANCE["fp16"] + 2**-8)


def test_guidance_that_skips_attention_scores_reaches_a_patched_model(device):
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    model, inputs = wan(device, torch.bfloat16)
    with AttentionScoreSkipFunctionMode():
        wanted = model(**inputs).sample
        with sageattention.patched():
            found = model(**inputs).sample
    plain = model(**inputs).sample
    # Self-attention is skipped, cross-attention is not: its keys are of another length.
    assert relative_l1(found, wanted.double()) < 0.05 < relative_l1(found, plain.double())
