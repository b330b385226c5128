"""Schemes that change from step to step, and SageAttention3's functions."""

import pytest
import sageattention
import sageattn3
import torch
import torch.nn.functional as F
from exact import assert_close, attention, qkv
from sageattention import HybridSchedule, sageattn

# Relative L1 of NVFP4 scores and P·V on N(0, 1), which oracle and kernels have at 0.16 to 0.21, with one level more.
FP4 = 0.3


def test_steps_have_their_schemes():
    schedule = HybridSchedule(6, first=2, last=1, outer="int8", inner="sage3-nvfp4")
    schemes = []
    for _ in range(12):
        schemes.append(schedule.scheme)
        schedule.step()
    process = ["int8", "int8", "sage3-nvfp4", "sage3-nvfp4", "sage3-nvfp4", "int8"]
    assert schemes == 2 * process
    schedule.step()
    schedule.reset()
    assert schedule.at == 0 and schedule.scheme == "int8"
    assert [schedule.scheme_of(step) for step in range(6)] == process
    kwargs = {"latents": 1}
    assert schedule.on_step_end(None, 1, 900, kwargs) is kwargs
    assert (schedule.at, schedule.scheme) == (2, "sage3-nvfp4")
    assert "at step 2" in repr(schedule)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps: value is 0, expected at least 1"),
        ({"steps": 4, "first": -1}, ValueError, "first: value is -1, expected at least 0"),
        ({"steps": 4, "first": 3, "last": 2}, ValueError, "first + last: value is 5, expected at most 4"),
        ({"steps": 4, "last": 1.5}, TypeError, "last"),
        ({"steps": 4, "inner": "sage4"}, ValueError, "scheme: value is sage4, expected one of full"),
        ({"steps": 4, "outer": 8}, ValueError, "scheme: value is 8"),
    ],
)
def test_wrong_schedules_are_refused(arguments, error, message):
    with pytest.raises(error) as raised:
        HybridSchedule(**arguments)
    assert message in str(raised.value)


def test_calls_have_the_scheme_of_the_step(device):
    q, k, v = qkv(1, 2, 2, 100, 300, 64, dtype=torch.float16, device=device)
    schedule = HybridSchedule(3, outer="full", inner="int8")
    for scheme in ("full", "int8", "full", "full"):
        wanted = sageattn(q, k, v, scheme=scheme)
        assert torch.equal(schedule(q, k, v), wanted)
        assert torch.equal(
            schedule(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), "NHD"), wanted.transpose(1, 2)
        )
        schedule.step()


def test_torchs_function_follows_the_schedule(device):
    q, k, v = qkv(1, 2, 2, 100, 300, 64, dtype=torch.float16, device=device)
    schedule = HybridSchedule(3, outer="full", inner="int8")
    wanted = {scheme: sageattn(q, k, v, scheme=scheme) for scheme in ("full", "int8")}
    with sageattention.patched(schedule):
        for scheme in ("full", "int8", "full"):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), wanted[scheme])
            schedule.step()
        torch.compiler.reset()
        graphs = 0

        def count(module, inputs):
            nonlocal graphs
            graphs += 1
            return module

        compiled = torch.compile(lambda: F.scaled_dot_product_attention(q, k, v), backend=count, fullgraph=True)
        for scheme in 3 * ("full", "int8", "full"):
            assert torch.equal(compiled(), wanted[scheme])
            schedule.step()
        assert graphs == 2, "a graph for each scheme, none for each step"


@pytest.mark.parametrize("per_block_mean", [False, True])
@pytest.mark.parametrize("single_level_p_quant", [False, True])
def test_sage3_computes_fp4_where_asked(device, per_block_mean, single_level_p_quant):
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 12:
        pytest.skip("FP4 needs compute capability 12")
    q, k, v = qkv(1, 2, 2, 130, 300, 64, dtype=torch.float16, device=device)
    options = {"per_block_mean": per_block_mean, "single_level_p_quant": single_level_p_quant}
    out = sageattn3.sageattn3_blackwell(q, k, v, fp4=True, **options)
    exact = attention(q, k, v)[0]
    assert_close(out, exact, FP4)
    error = (out - exact).abs().sum() / exact.abs().sum()
    assert error > 0.05, "more accurate than FP4 can be"
    out, lse = sageattn3.sageattn3_blackwell(q, k, v, fp4=True, is_causal=True, return_lse=True, **options)
    assert_close(out, attention(q, k, v, causal="bottom_right")[0], FP4)
    assert lse.shape == (1, 2, 130)


def test_attn_qats_function_smooths_nothing(device):
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 12:
        pytest.skip("FP4 needs compute capability 12")
    q, k, v = qkv(1, 2, 2, 130, 300, 64, dtype=torch.float16, device=device)
    out = sageattn3.sageattn_blackwell(q, k, v, fp4=True)
    assert torch.equal(out, sageattn(q, k, v, scheme="attn-qat-nvfp4"))
    with pytest.raises(NotImplementedError, match="single_level_p_quant: value is False, expected True"):
        sageattn3.sageattn_blackwell(q, k, v, single_level_p_quant=False)


def test_fp4_is_refused_by_gpus_that_lack_it(device):
    if device != "cuda" or torch.cuda.get_device_capability()[0] == 12:
        pytest.skip("of GPUs without FP4")
    q, k, v = qkv(1, 2, 2, 130, 300, 64, dtype=torch.float16, device=device)
    with pytest.raises(NotImplementedError, match="the nearest that this GPU computes is"):
        sageattn3.sageattn3_blackwell(q, k, v, fp4=True)
    assert torch.equal(sageattn3.sageattn3_blackwell(q, k, v), sageattn(q, k, v))
