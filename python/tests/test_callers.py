"""The calls of the programs that use SageAttention, keyword by keyword."""

import importlib.metadata
import inspect
import subprocess
import sys
from functools import partial

import pytest
import sageattention
import sageattn3
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, attention, qkv, random
from sageattention import (  # noqa: F401 - diffusers imports these six at once
    sageattn,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_varlen,
)

RING = [
    partial(function, tensor_layout="NHD", return_lse=True)
    for function in (
        sageattn,
        sageattn_qk_int8_pv_fp16_cuda,
        sageattn_qk_int8_pv_fp16_triton,
        sageattn_qk_int8_pv_fp8_cuda,
        sageattn_qk_int8_pv_fp8_cuda_sm90,
        sageattn3.sageattn3_blackwell,
    )
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_comfyui(device, masked, skip_reshape):
    assert "attn_mask" in inspect.signature(sageattn).parameters
    q, k, v = qkv(2, 4, 4, 90, 77, 64, dtype=torch.float16, device=device)
    layout = "HND"
    mask = (random(2, 1, 90, 77, seed=3, device=device) > 0) if masked else None
    wanted = attention(q, k, v, mask=mask)[0]
    if not skip_reshape:
        q, k, v, wanted, layout = *(x.transpose(1, 2).contiguous() for x in (q, k, v)), wanted.transpose(1, 2), "NHD"
    options = {} if mask is None else {"attn_mask": mask}
    out = sageattn(q, k, v, is_causal=False, tensor_layout=layout, sm_scale=None, smooth_k=False, **options)
    assert_close(out, wanted, TOLERANCE["fp16"])
    out = out.transpose(1, 2).reshape(2, -1, 4 * 64) if layout == "HND" else out.reshape(2, -1, 4 * 64)
    assert out.shape == (2, 90, 256)


def test_comfyui_sage3(device):
    q, k, v = qkv(1, 4, 4, 130, 200, 128, dtype=torch.bfloat16, device=device)
    before = k.clone()
    assert_close(sageattn3.sageattn3_blackwell(q, k, v, is_causal=False), attention(q, k, v)[0], TOLERANCE["fp16"])
    assert torch.equal(k, before), "K was changed in place, as the original does"


@pytest.mark.parametrize(
    "function",
    [
        sageattn,
        partial(sageattn_qk_int8_pv_fp16_cuda, pv_accum_dtype="fp32"),
        sageattn_qk_int8_pv_fp16_triton,
        partial(sageattn_qk_int8_pv_fp8_cuda, pv_accum_dtype="fp32+fp32"),
        partial(sageattn_qk_int8_pv_fp8_cuda, pv_accum_dtype="fp32+fp16"),
    ],
    # Without addresses, which differ from process to process.
    ids=["sageattn", "fp16_cuda", "fp16_triton", "fp8_cuda", "fp8_cuda_2pp"],
)
def test_kjnodes(device, function):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    q, k, v = qkv(1, 4, 4, 100, 100, 64, layout="NHD", dtype=torch.float16, device=device)
    mask = random(100, 100, seed=3, dtype=torch.float16, device=device)
    for attn_mask in (None, mask):
        out = function(q, k, v, is_causal=False, attn_mask=attn_mask, tensor_layout="NHD")
        assert_close(out, attention(q, k, v, layout="NHD", mask=attn_mask)[0], TOLERANCE["fp8"])


def test_kjnodes_sage3(device):
    q, k, v = qkv(1, 4, 4, 100, 100, 64, dtype=torch.float16, device=device)
    for per_block_mean in (False, True):
        out = sageattn3.sageattn3_blackwell(q, k, v, is_causal=False, attn_mask=None, per_block_mean=per_block_mean)
        assert_close(out, attention(q, k, v)[0], TOLERANCE["fp16"])


def test_sglang_and_vllm_omni(device):
    q, k, v = qkv(1, 8, 2, 100, 100, 128, layout="NHD", dtype=torch.bfloat16, device=device)
    out = sageattn(q, k, v, tensor_layout="NHD", is_causal=True, sm_scale=128**-0.5, return_lse=False)
    assert_close(out, attention(q, k, v, layout="NHD", causal="bottom_right")[0], TOLERANCE["fp16"])


@pytest.mark.parametrize(
    "function",
    [partial(sageattn_qk_int8_pv_fp16_cuda, pv_accum_dtype="fp32"), partial(sageattn_qk_int8_pv_fp8_cuda, pv_accum_dtype="fp32+fp32")],
    ids=["fp16", "fp8"],
)  # fmt: skip
def test_yunchang_and_xdit(device, function):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    q, k, v = qkv(1, 4, 4, 100, 150, 64, layout="NHD", dtype=torch.float16, device=device)
    out, lse = partial(function, tensor_layout="NHD", return_lse=True)(q, k, v, is_causal=False, sm_scale=None)
    wanted, wanted_lse = attention(q, k, v, layout="NHD")
    assert_close(out, wanted, TOLERANCE["fp8"])
    assert_lse_close(lse, wanted_lse)


@pytest.mark.parametrize("window", [[-1, -1], (-1, -1), (None, None), None])
def test_servers_pass_flash_attention_s_keywords(device, window):
    """vLLM and SGLang hand their backends flash-attention's keywords, with lists for tuples and None for what is not set."""
    q, k, v = qkv(1, 8, 2, 100, 100, 64, layout="NHD", dtype=torch.bfloat16, device=device)
    out = sageattn(
        q, k, v, tensor_layout="NHD", softmax_scale=0.11, causal=True, window_size=window, softcap=0.0,
        alibi_slopes=None, dropout_p=0.0, block_table=None, q_descale=None, k_descale=None, v_descale=None,
    )  # fmt: skip
    assert_close(out, attention(q, k, v, layout="NHD", scale=0.11, causal="bottom_right")[0], TOLERANCE["fp16"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("function", RING, ids=lambda function: function.func.__name__)
def test_yunchang_s_ring(device, function, causal):
    """Every keyword of flash-attention's forward, which the ring hands to whatever computes its steps."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    q, k, v = qkv(2, 4, 2, 100, 100, 64, layout="NHD", dtype=torch.float16, device=device)
    for window in ((-1, -1), (30, 0)):
        out, lse = function(
            q, k, v, dropout_p=0.0, softmax_scale=0.11, causal=causal, window_size=window, softcap=0.0,
            alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        wanted, wanted_lse = attention(
            q, k, v, layout="NHD", scale=0.11, causal="bottom_right" if causal else None,
            window=tuple(None if limit < 0 else limit for limit in window),
        )  # fmt: skip
        assert_close(out, wanted, TOLERANCE["fp8"])
        assert_lse_close(lse, wanted_lse)
    with pytest.raises(NotImplementedError, match="return_softmax: value is True"):
        function(q, k, v, dropout_p=0.0, softmax_scale=None, causal=causal, return_softmax=True)


def test_signatures_are_the_original_s():
    """Positions and defaults of SageAttention 2.2; what is ours comes after."""
    originals = {
        "sageattn": "q k v tensor_layout=HND is_causal=False sm_scale=None return_lse=False",
        "sageattn_varlen": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k is_causal=False sm_scale=None smooth_k=True",
        "sageattn_qk_int8_pv_fp16_triton": "q k v tensor_layout=HND quantization_backend=triton is_causal=False attn_mask=None sm_scale=None smooth_k=True return_lse=False",
        "sageattn_qk_int8_pv_fp16_cuda": "q k v tensor_layout=HND is_causal=False qk_quant_gran=per_thread sm_scale=None pv_accum_dtype=fp32 smooth_k=True smooth_v=False return_lse=False",
        "sageattn_qk_int8_pv_fp8_cuda": "q k v tensor_layout=HND is_causal=False qk_quant_gran=per_thread sm_scale=None pv_accum_dtype=fp32+fp16 smooth_k=True smooth_v=False return_lse=False",
        "sageattn_qk_int8_pv_fp8_cuda_sm90": "q k v tensor_layout=HND is_causal=False qk_quant_gran=per_thread sm_scale=None pv_accum_dtype=fp32+fp32 smooth_k=True return_lse=False",
    }  # fmt: skip
    for name, wanted in originals.items():
        parameters = list(inspect.signature(getattr(sageattention, name)).parameters.values())
        found = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
        assert found[: len(wanted.split())] == wanted.split(), name
        assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD, name


def test_the_distribution_answers_what_programs_ask_for():
    version = importlib.metadata.version("sageattention")
    assert version == sageattention.__version__ and tuple(map(int, version.split("."))) >= (2, 1, 1)


def test_importing_is_fast_and_brings_no_framework():
    program = (
        "import time; start = time.perf_counter(); import sageattention, sageattention.sparse, sageattn3, spas_sage_attn, sparse_sageattn, sys; "
        "print(time.perf_counter() - start, *({'torch', 'numpy', 'jax', 'transformers'} & set(sys.modules)))"
    )
    lines = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    seconds = [line.stdout.split() for line in lines]
    assert all(len(found) == 1 for found in seconds), seconds
    fastest = min(float(found[0]) for found in seconds)
    print(f"import: {fastest * 1e3:.0f} ms")
    assert fastest < 0.3


def test_a_missing_gpu_is_an_error_that_says_so():
    from sageattention import _native
    from sageattention._request import Request, native_options

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    x = (0, (1, 1, 1, 64), (64, 64, 64, 1), "float16")
    with pytest.raises(RuntimeError, match="(?i)driver|cuda"):
        _native.forward(x, x, x, x, native_options(Request()), stream=(0, 0))
