"""What is wrong with a call is said: the tensor or option, the value found, the value wanted."""

import pytest
import sageattention
import torch
from exact import qkv, random

X = random(1, 4, 70, 64, seed=0)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "tensor_layout: value is BSHD, expected HND or NHD", lambda f: f(X, X, X, tensor_layout="BSHD")),
        (ValueError, r"q: shape is \[4, 70, 64\], expected \[batch, heads, seq, head_dim\]", lambda f: f(X[0], X, X)),
        (
            ValueError,
            r"q: shape is \[4, 70, 64\], expected \[batch, seq, heads, head_dim\]",
            lambda f: f(X[0], X, X, tensor_layout="NHD", return_lse=True),
        ),
        (
            ValueError,
            r"k: shape is \[1, 3, 70, 64\], expected a number of heads that divides q's 4",
            lambda f: f(X, X[:, :3], X[:, :3]),
        ),
        (
            ValueError,
            r"v: shape is \[1, 4, 69, 64\], expected \[1, 4, 70, head_dim\], as k",
            lambda f: f(X, X, X[:, :, :69]),
        ),
        (ValueError, "head_dim: value is 600, expected 1 to 576", lambda f: f(*qkv(1, 1, 1, 4, 4, 600))),
        (TypeError, "q: dtype is float64, expected f16, bf16 or f32", lambda f: f(X.double(), X.double(), X.double())),
        (TypeError, "k: dtype is f16, expected f32, as q", lambda f: f(X, X.half(), X)),
        (
            TypeError,
            "mask: dtype is int64, expected bool, f16, bf16 or f32",
            lambda f: f(X, X, X, attn_mask=torch.ones(70, 70, dtype=torch.int64)),
        ),
        (
            ValueError,
            r"mask: shape is \[70, 69\], expected broadcastable to \[1, 4, 70, 70\]",
            lambda f: f(X, X, X, attn_mask=torch.ones(70, 69, dtype=torch.bool)),
        ),
        (
            ValueError,
            r"mask: shape is \[1, 1, 70, 69\], expected broadcastable to \[1, 4, 70, 70\]",
            lambda f: f(X, X, X, attn_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, 70, 69)),
        ),
        (ValueError, "sm_scale: value is -1, expected a finite number above 0", lambda f: f(X, X, X, sm_scale=-1)),
        (
            NotImplementedError,
            "dropout_p: value is 0.1, expected None or 0: .* does not compute it",
            lambda f: f(X, X, X, dropout_p=0.1),
        ),
        (NotImplementedError, "alibi_slopes: value is Tensor, expected None", lambda f: f(X, X, X, alibi_slopes=X)),
        (TypeError, "k: type is list, expected torch.Tensor, as q", lambda f: f(X, [1], X)),
        (TypeError, "q: type is list, expected a tensor of torch, numpy, CuPy, JAX", lambda f: f([1], X, X)),
    ],
)
@pytest.mark.parametrize("function", ["sageattn", "sageattn_qk_int8_pv_fp16_cuda"])
def test_messages(function, error, message, call):
    with pytest.raises(error, match=message):
        call(getattr(sageattention, function))


def test_values_of_the_original_s_options():
    for name, option, value, wanted in [
        ("sageattn_qk_int8_pv_fp16_cuda", "pv_accum_dtype", "fp64", "fp32 or fp16 or fp16\\+fp32"),
        ("sageattn_qk_int8_pv_fp8_cuda", "pv_accum_dtype", "fp16", "fp32\\+fp16 or fp32\\+fp32 or fp32"),
        ("sageattn_qk_int8_pv_fp8_cuda_sm90", "pv_accum_dtype", "fp16", "fp32\\+fp32"),
        ("sageattn_qk_int8_pv_fp16_cuda", "qk_quant_gran", "per_head", "per_thread or per_warp"),
        ("sageattn_qk_int8_pv_fp16_triton", "quantization_backend", "cpp", "triton or cuda"),
        ("sageattn", "causal_alignment", "left", "bottom_right or top_left"),
        ("sageattn", "scheme", "sage9", "one of full, int8, "),
    ]:
        with pytest.raises(ValueError, match=f"{option}: value is {value}, expected {wanted}"):
            getattr(sageattention, name)(X, X, X, is_causal=True, **{option: value})
    with pytest.raises(NotImplementedError, match="pv_accum_dtype: value is fp32"):
        sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90(X, X, X, pv_accum_dtype="fp32")


def test_smoothing_v_for_wide_sums_warns_as_in_the_original():
    with pytest.warns(UserWarning, match="smooth_v is for fp16: ignored"):
        sageattention.sageattn_qk_int8_pv_fp16_cuda(X, X, X, smooth_v=True)


def test_gradients_are_refused_where_they_would_be_missing():
    x = X.clone().requires_grad_()
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="k: requires_grad is True, expected False"):
        sageattention.sageattn(X, x, X)
    with torch.no_grad():
        sageattention.sageattn(X, x, X)
    with torch.inference_mode():
        sageattention.sageattn(X, x, X)


def test_harmless_keywords_are_ignored():
    wanted = sageattention.sageattn(X, X, X)
    found = sageattention.sageattn(
        X, X, X, dropout_p=0.0, window_size=(-1, -1), softcap=0, deterministic=True, smooth_k=False,
        pv_accum_dtype="fp32", enable_gqa=True, attn_mask=None, return_softmax=False, alibi_slopes=None, unheard_of=1,
    )  # fmt: skip
    assert torch.equal(found, wanted)


def test_float32_on_a_gpu_says_what_would_do(cuda):
    x = X.to(cuda)
    with pytest.raises(TypeError, match="q: dtype is f32, expected f16 or bf16 on a GPU"):
        sageattention.sageattn(x, x, x)


def test_tensors_of_two_devices(cuda):
    x = X.half()
    with pytest.raises(ValueError, match="k: device is cpu, expected cuda:0, as q"):
        sageattention.sageattn(x.to(cuda), x, x.to(cuda))


def test_schemes_of_every_generation_run_on_the_cpu():
    exact = sageattention.sageattn(X, X, X, scheme="full")
    for scheme in ["sage1-int8-fp16", "sage2-int8-fp8-per-thread", "sage2-int4-fp8", "sage3-nvfp4", "sage3-mxfp4"]:
        out = sageattention.sageattn(X, X, X, scheme=scheme)
        assert 0 < (out - exact).abs().sum() < 0.3 * exact.abs().sum(), scheme
