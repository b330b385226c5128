"""diffusers from PyPI, untouched: its own code for sage backends, with tiny random transformers."""

import pytest
import sageattention
import torch
from exact import TOLERANCE, assert_close, attention, random, relative_l1

pytest.importorskip("diffusers")
from diffusion_models import flux, sd35, wan  # noqa: E402 - it imports diffusers

BACKENDS = [
    "sage",
    "sage_varlen",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
]


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


def test_patch_reaches_models_that_ignore_the_backend(device):
    """Why README has patch() first: some models call torch's function themselves."""
    model, inputs = sd35(device, torch.bfloat16)
    wanted = model(**inputs).sample
    sageattention.counts(reset=True)
    model.set_attention_backend("sage")
    assert torch.equal(model(**inputs).sample, wanted) and sageattention.counts() == (0, {}), "it has an effect now"
    model.set_attention_backend("native")
    with sageattention.patched():
        found = model(**inputs).sample
    assert sageattention.counts() == (3, {})
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
