"""diffusers' sage backends after `register_diffusers`: every model of `diffusion_models`, masks, heads, fallbacks."""

import functools
import logging

import pytest
import sageattention
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, attention, int8_scheme, qkv, random, relative_l1

pytest.importorskip("diffusers")
from diffusers.models.attention_dispatch import (  # noqa: E402
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from diffusion_models import DISPATCHED, MASKED, THEIR_OWN, flux, outputs, qwen_image, wan  # noqa: E402

BACKENDS = [
    "sage",
    "sage_varlen",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
]


def of(builds):
    """Each without masks, and with them where it takes any."""
    return [(build, masked) for build in builds for masked in (False, True) if not masked or build in MASKED]


@pytest.fixture(autouse=True)
def registered():
    """Puts diffusers' own functions back afterwards, which other tests are about."""
    tables = [_AttentionBackendRegistry._backends, _AttentionBackendRegistry._constraints]
    tables += [_AttentionBackendRegistry._supported_arg_names, _AttentionBackendRegistry._supports_context_parallel]
    before = [table.copy() for table in tables]
    sageattention.register_diffusers()
    sageattention.counts(reset=True)
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


@pytest.fixture
def calls(monkeypatch):
    """What the sage backend was called with, and what it gave."""
    recorded = []
    function = _AttentionBackendRegistry._backends[AttentionBackendName.SAGE]

    @functools.wraps(function)
    def recording(**options):
        out = function(**options)
        recorded.append((options, out))
        return out

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.SAGE, recording)
    return recorded


def exact(options):
    mask = options["attn_mask"]
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None]
    q, k, v = options["query"], options["key"], options["value"]
    return attention(q, k, v, layout="NHD", mask=mask, scale=options["scale"])[0]


@pytest.mark.parametrize(("build", "masked"), of(DISPATCHED))
def test_models(device, build, masked, calls):
    model, inputs = build(device, torch.bfloat16, masked)
    model.set_attention_backend("native")
    wanted = outputs(model, inputs)
    model.set_attention_backend("sage")
    found = outputs(model, inputs)
    assert calls and sageattention.counts() == (len(calls), {})
    # Each call by itself, as a random model's output hangs little on its attention. A bf16 output's last bit on top.
    for options, out in calls:
        assert_close(out, exact(options), TOLERANCE["fp16"] + 2**-8)
    if masked:
        assert any(options["attn_mask"] is not None for options, _ in calls)
    assert relative_l1(found, wanted.double()) < 0.02


@pytest.mark.parametrize(("build", "masked"), of(THEIR_OWN))
def test_models_that_call_torch_themselves_are_patched(device, build, masked, monkeypatch):
    model, inputs = build(device, torch.bfloat16, masked)
    wanted = outputs(model, inputs)
    recorded = []
    with sageattention.patched():
        ours = torch.nn.functional.scaled_dot_product_attention

        def recording(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
            out = ours(query, key, value, attn_mask, dropout_p, is_causal, scale)
            recorded.append((out, attention(query, key, value, mask=attn_mask, scale=scale)[0]))
            return out

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
        found = outputs(model, inputs)
        monkeypatch.undo()
    assert recorded and sageattention.counts() == (len(recorded), {})
    for out, wanted_out in recorded:
        assert_close(out, wanted_out, TOLERANCE["fp16"] + 2**-8)
    assert relative_l1(found, wanted.double()) < 0.02


@pytest.mark.parametrize("build", [wan, qwen_image])
def test_compiled_models(device, build):
    model, inputs = build(device, torch.bfloat16, True)
    model.set_attention_backend("sage")
    eager = outputs(model, inputs)
    torch._dynamo.reset()
    sageattention.counts(reset=True)
    # qwen-image looks into its mask, which breaks the graph; attention must not.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=build is wan)
    found = outputs(compiled, inputs)
    assert sageattention.counts().fallbacks == {} and sageattention.counts().accelerated >= 2
    assert relative_l1(found, eager.double()) < 5e-3


def call(backend, q, k, v, **options):
    return dispatch_attention_fn(q, k, v, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_and_grouped_heads(device, backend):
    q, k, v = qkv(2, 4, 2, 70, 90, 64, layout="NHD", dtype=torch.bfloat16, device=device)
    hidden = random(2, 1, 70, 90, seed=5, device=device) > -0.5
    padding = torch.ones(2, 90, dtype=torch.bool, device=device)
    padding[1, 40:] = False
    bias = random(1, 4, 70, 90, seed=6, dtype=torch.bfloat16, device=device)
    tolerance = TOLERANCE["fp8" if "fp8" in backend else "fp16"] + 2**-8
    for mask, wide in ((None, None), (hidden, hidden), (padding, padding[:, None, None]), (bias, bias)):
        out = call(backend, q, k, v, attn_mask=mask, enable_gqa=True, scale=0.2)
        assert_close(out, attention(q, k, v, layout="NHD", mask=wide, scale=0.2)[0], tolerance)
    out = call(backend, q, k, v, is_causal=True, attn_mask=padding, enable_gqa=True)
    wanted = attention(q, k, v, layout="NHD", causal="top_left", mask=padding[:, None, None])[0]
    assert_close(out, wanted, tolerance)
    assert sageattention.counts() == (5, {})


def test_the_log_sum_exp(device):
    q, k, v = qkv(1, 4, 2, 70, 90, 64, layout="NHD", dtype=torch.bfloat16, device=device)
    out, lse = call("sage", q, k, v, enable_gqa=True, attention_kwargs={"return_lse": True})
    wanted, wanted_lse = attention(q, k, v, layout="NHD")
    assert_close(out, wanted, TOLERANCE["fp16"] + 2**-8)
    assert_lse_close(lse, wanted_lse)


def test_what_is_left_to_diffusers_native_backend(device, caplog):
    dtype = torch.bfloat16
    q, k, v = qkv(1, 2, 2, 30, 30, 64, layout="NHD", dtype=dtype, device=device)
    with caplog.at_level(logging.WARNING, "sageattention"):
        dropped = call("sage", q, k, v, dropout_p=0.9)
    assert relative_l1(dropped, attention(q, k, v, layout="NHD")[0]) > 0.3
    assert [record.getMessage() for record in caplog.records] == [
        "diffusers' sage is left to torch: dropout_p is above 0"
    ]
    with pytest.raises(NotImplementedError, match="return_lse: value is True, expected False: .* dropout_p is above 0"):
        call("sage", q, k, v, dropout_p=0.9, attention_kwargs={"return_lse": True})
    with torch.enable_grad():
        leaf = q.clone().requires_grad_()
        call("sage", leaf, k, v).sum().backward()
    assert leaf.grad is not None and leaf.grad.shape == q.shape
    assert sageattention.counts().accelerated == 0


def test_a_scheme_and_a_schedule(device):
    model, inputs = flux(device, torch.bfloat16)
    found = {}
    for scheme in ("full", int8_scheme(device)):
        sageattention.register_diffusers(scheme)
        model.set_attention_backend("sage")
        found[scheme] = outputs(model, inputs)
    full, quantised = found.values()
    assert not torch.equal(full, quantised)
    schedule = sageattention.HybridSchedule(3, outer="full", inner=int8_scheme(device))
    sageattention.register_diffusers(schedule)
    for wanted in (full, quantised, full):
        assert torch.equal(outputs(model, inputs), wanted)
        schedule.step()
    with pytest.raises(ValueError, match="scheme: value is sage9, expected one of full, int8"):
        sageattention.register_diffusers("sage9")
