"""Under autocast every entry point casts as torch does: q and k in float32 after a norm, v in bfloat16."""

import pytest
import sageattention
import sageattn3
import torch
from exact import TOLERANCE, assert_close, attention, qkv, random

DENSE = {
    "sageattn": sageattention.sageattn,
    "fp16_triton": sageattention.sageattn_qk_int8_pv_fp16_triton,
    "fp16_cuda": sageattention.sageattn_qk_int8_pv_fp16_cuda,
    "sage3": sageattn3.sageattn3_blackwell,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", DENSE.values(), ids=DENSE)
def test_dense(device, function, dtype):
    q, k, v = qkv(1, 4, 2, 60, 70, 64, device=device)
    mask = random(60, 70, seed=9, device=device)
    with torch.autocast(device, dtype=dtype):
        out, lse = function(q, k, v.to(dtype), attn_mask=mask, return_lse=True)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q, k, v.to(dtype), attn_mask=mask, enable_gqa=True
        )  # fmt: skip
    assert out.dtype == wanted.dtype == dtype and lse.dtype == torch.float32
    assert_close(out, attention(q, k, v, mask=mask)[0], TOLERANCE["fp16"] + 2**-7)
    with torch.autocast(device, dtype=dtype), torch.autocast(device, enabled=False):
        with pytest.raises(TypeError, match="dtype is"):
            function(q, k, v.to(dtype))


def test_packed(device):
    q, k, v = (x[0] for x in qkv(1, 4, 2, 60, 60, 64, layout="NHD", device=device))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = sageattention.sageattn_varlen(q, k, v.bfloat16(), [0, 60], [0, 60], 60, 60)
    assert out.dtype == torch.bfloat16
    wanted, _ = attention(q[None], k[None], v[None], layout="NHD")
    assert_close(out[None], wanted, TOLERANCE["fp16"] + 2**-7)


def test_double_precision_is_left_alone_as_torch_leaves_it(device):
    q, k, v = qkv(1, 2, 2, 20, 20, 64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="q: dtype is float64"):
            sageattention.sageattn(q.double(), k, v)
        with sageattention.patched(), pytest.raises(RuntimeError, match="dtype"):
            torch.nn.functional.scaled_dot_product_attention(q.double(), k, v)


def test_transformers(device):
    transformers = pytest.importorskip("transformers")
    from sageattention._transformers import attention_forward

    assert transformers
    q, k, v = qkv(1, 4, 2, 60, 60, 64, device=device)
    module = torch.nn.Module()
    sageattention.counts(reset=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, _ = attention_forward(module, q, k, v.bfloat16(), None)
    assert out.dtype == torch.bfloat16 and sageattention.counts() == (1, {})
    wanted = attention(q, k, v, causal="top_left")[0].transpose(1, 2)
    assert_close(out, wanted, TOLERANCE["fp16"] + 2**-7)


def test_diffusers(device):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.models import attention_dispatch

    assert diffusers
    q, k, v = qkv(1, 2, 2, 60, 60, 64, layout="NHD", device=device)
    wanted = attention(q, k, v, layout="NHD")[0]
    with torch.autocast(device, dtype=torch.bfloat16):
        for backend in ("sage", "_sage_qk_int8_pv_fp16_cuda"):
            out = attention_dispatch.dispatch_attention_fn(q, k, v.bfloat16(), backend=backend)
            assert out.dtype == torch.bfloat16
            assert_close(out, wanted, TOLERANCE["fp16"] + 2**-7)


def test_the_compiled_call_casts_too(device):
    q, k, v = qkv(1, 2, 2, 60, 60, 64, device=device)

    def call(q, k, v):
        with torch.autocast(device, dtype=torch.bfloat16):
            return sageattention.sageattn(q, k, v)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v.bfloat16()), call(q, k, v.bfloat16()))
