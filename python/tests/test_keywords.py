"""Callers' names for an option, values as they write them, and what is said of the rest: in every function."""

from functools import partial

import numpy
import pytest
import sageattention
import sageattn3
import sparse_sageattn
import spas_sage_attn
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, attention, qkv, random
from sageattention.sparse import Predictor, sparse_attention

DENSE = {
    "sageattn": sageattention.sageattn,
    "fp16_triton": sageattention.sageattn_qk_int8_pv_fp16_triton,
    "fp16_cuda": sageattention.sageattn_qk_int8_pv_fp16_cuda,
    "fp8_cuda": sageattention.sageattn_qk_int8_pv_fp8_cuda,
    "fp8_sm90": sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90,
    "sage3": sageattn3.sageattn3_blackwell,
    "block_sparse": spas_sage_attn.block_sparse_sage2_attn_cuda,
    # All blocks, and the alignment that the others have.
    "meansim": partial(
        spas_sage_attn.spas_sage2_attn_meansim_cuda, cdfthreshd=1.0, simthreshd1=-1, causal_alignment="bottom_right"
    ),
    "meansim_topk": partial(spas_sage_attn.spas_sage_attn_meansim_topk_cuda, topk=1.0, causal_alignment="bottom_right"),
    "sparse_sageattn": partial(sparse_sageattn.sparse_sageattn, causal_alignment="bottom_right"),
    "sparse_attention": partial(sparse_attention, predictor=Predictor.sla(1.0)),
}
X = random(1, 4, 70, 64, seed=0)


def packed(q, k, v, **options):
    """`sageattn_varlen` of one sequence, as a dense function."""
    cu_q, cu_k = [0, q.shape[2]], [0, k.shape[2]]
    heads_inside = (x[0].transpose(0, 1) for x in (q, k, v))
    return sageattention.sageattn_varlen(*heads_inside, cu_q, cu_k, None, None, **options).transpose(0, 1)[None]


FUNCTIONS = {**DENSE, "varlen": packed}


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


@pytest.mark.parametrize(
    ("callers", "exact"),
    [
        ({"softmax_scale": 0.3}, {"scale": 0.3}),
        ({"scale": numpy.float32(0.25)}, {"scale": 0.25}),
        ({"sm_scale": torch.tensor(0.25), "scale": 0.25}, {"scale": 0.25}),
        ({"causal": True}, {"causal": "bottom_right"}),
        ({"is_causal": numpy.bool_(True), "causal": 1}, {"causal": "bottom_right"}),
        ({"window_size": (20, 10)}, {"window": (20, 10)}),
        ({"window": [20, -1]}, {"window": (20, None)}),
        ({"window_size": (None, numpy.int64(7)), "window": None}, {"window": (None, 7)}),
        ({"window": (20, 10), "causal_alignment": "top_left"}, {"top_left_window": (20, 10)}),
        ({"window_size": (-1, -1), "softcap": 0.0, "logit_softcap": None}, {}),
        ({"window_size": [-1, -1], "logit_softcap": -0.0}, {}),
        ({"window": -1, "alibi_slopes": None, "return_softmax": False, "dropout_p": 0.0}, {}),
        ({"softcap": 2.5}, {"softcap": 2.5}),
    ],
    ids=lambda value: "-".join(value),
)
def test_callers_names(function, callers, exact):
    q, k, v = qkv(1, 4, 2, 100, 150, 64)
    if "top_left_window" in exact:
        # `attention` knows such a diagonal of causal masks only.
        left, right = exact["top_left_window"]
        distance = torch.arange(150)[None, :] - torch.arange(100)[:, None]
        exact = {"mask": (distance >= -left) & (distance <= right)}
    wanted = attention(q, k, v, **exact)[0]
    assert_close(function(q, k, v, **callers), wanted, TOLERANCE["fp8"])


def test_layout_scale_and_log_sum_exp_of_sage3():
    q, k, v = qkv(1, 4, 2, 100, 150, 64, layout="NHD")
    wanted, wanted_lse = attention(q, k, v, layout="NHD", scale=0.3)
    out, lse = sageattn3.sageattn3_blackwell(q, k, v, tensor_layout="NHD", sm_scale=0.3, return_lse=True)
    assert_close(out, wanted, TOLERANCE["fp16"])
    assert_lse_close(lse, wanted_lse)


def test_a_position_left_open_takes_another_name_s_value():
    wanted = sageattention.sageattn(X, X, X, "HND", True, 0.3)
    assert torch.equal(sageattention.sageattn(X, X, X, "HND", True, None, softmax_scale=0.3), wanted)
    assert torch.equal(sageattention.sageattn(X, X, X, "HND", True, 0.3, softmax_scale=0.3, causal=True), wanted)
    with pytest.raises(TypeError, match="causal: value is True, expected False, as is_causal"):
        sageattention.sageattn(X, X, X, "HND", False, causal=True)


def test_smoothing_is_smooth_k_where_a_function_has_that():
    q, k, v = qkv(1, 2, 2, 256, 256, 64)
    k = k + 20
    for function in (DENSE["fp16_cuda"], DENSE["block_sparse"], partial(packed, scheme="int8")):
        assert torch.equal(function(q, k, v, smoothing=False), function(q, k, v, smooth_k=False))
        assert not torch.equal(function(q, k, v, smoothing=False), function(q, k, v))


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "softmax_scale: value is 0.3, expected 0.2, as (sm_)?scale", {"sm_scale": 0.2, "softmax_scale": 0.3}),
        (TypeError, "causal: value is True, expected False, as is_causal", {"is_causal": False, "causal": True}),
        (TypeError, r"window_size: value is \(3, 3\), expected \(2, 2\)", {"window": (2, 2), "window_size": (3, 3)}),
        (TypeError, "softcap: value is 0.0, expected 5.0", {"logit_softcap": 5.0, "softcap": 0.0}),
        (TypeError, "is_casual: .* has no such keyword, expected is_causal", {"is_casual": True}),
        (TypeError, "sm_scal: .* expected sm_scale", {"sm_scal": 0.1}),
        (TypeError, "window: value is 3, of type int, expected .left, right., such as .3, 0. or .3, 3.", {"window": 3}),
        (TypeError, r"window\[0\]: value is 1.5, of type float, expected an integer", {"window": (1.5, 0)}),
        (TypeError, r"window\[1\]: value is True, of type bool, expected an integer", {"window": (1, True)}),
        (ValueError, r"window\[0\]: value is -2, expected -1 \(no limit\), None, 0 or more", {"window": (-2, 0)}),
        (ValueError, r"window: value is \(1, 2, 3\), expected two limits", {"window": (1, 2, 3)}),
        (TypeError, "is_causal: value is yes, of type str, expected True or False", {"is_causal": "yes"}),
        (TypeError, "is_causal: value is 0.0, of type float, expected True or False", {"is_causal": 0.0}),
        (TypeError, "scale: value is True, of type bool, expected a number", {"softmax_scale": True}),
        (TypeError, "scale: value is half, of type str, expected a number", {"softmax_scale": "half"}),
        (ValueError, "sm_scale: value is 1e-46, expected a finite number above 0 that float32 holds", {"softmax_scale": 1e-46}),
        (ValueError, "sm_scale: value is 1e39, expected a finite number above 0", {"softmax_scale": 1e39}),
        (ValueError, "sm_scale: value is -0, expected a finite number above 0", {"softmax_scale": -0.0}),
        (ValueError, "sm_scale: value is NaN, expected a finite number above 0", {"softmax_scale": float("nan")}),
        (ValueError, "logit_softcap: value is -1, expected a finite number above 0", {"softcap": -1.0}),
        (ValueError, "causal_alignment: value is centre, expected bottom_right or top_left", {"causal_alignment": "centre"}),
        (NotImplementedError, "return_softmax: value is True, expected None or 0", {"return_softmax": True}),
        (NotImplementedError, "dropout_p: value is 0.1, expected", {"dropout_p": 0.1}),
        (NotImplementedError, "alibi_slopes: value is Tensor, expected None", {"alibi_slopes": X}),
        (NotImplementedError, "attn_bias: value is Tensor, expected None: .*; attn_mask takes", {"attn_bias": X}),
        (NotImplementedError, "out: value is Tensor, expected None", {"out": X}),
        (NotImplementedError, "sliding_window: value is 128, expected None or -1: .*; window takes", {"sliding_window": 128}),
        (NotImplementedError, "block_table: value is Tensor, expected None", {"block_table": X}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_messages_of_every_function(function, error, message, options):
    with pytest.raises(error, match=message):
        function(X, X, X, **options)


@pytest.mark.parametrize("name", [name for name in DENSE if name not in ("sageattn", "sparse_attention")])
def test_a_scheme_is_refused_where_the_function_names_one(name):
    with pytest.raises(NotImplementedError, match="scheme: value is full, expected None"):
        DENSE[name](X, X, X, scheme="full")


def test_a_call_in_the_positions_of_torch_s_function_names_patch():
    """The original's README: `F.scaled_dot_product_attention = sageattn`."""
    mask = torch.ones(70, 70, dtype=torch.bool)
    taken = sageattention.sageattn(X, X, X, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=0.1, enable_gqa=True)
    assert torch.equal(taken, sageattention.sageattn(X, X, X, attn_mask=mask, sm_scale=0.1))
    for positions in ((mask,), (mask, 0.0, False), (None, 0.0, True)):
        with pytest.raises(
            TypeError, match=r"tensor_layout: value is .*, expected HND or NHD; .*sageattention\.patch\(\)"
        ):
            sageattention.sageattn(X, X, X, *positions)


def test_layouts_of_tensors_that_are_not_dense():
    nested = torch.nested.nested_tensor([random(5, 64, seed=0), random(7, 64, seed=1)], layout=torch.jagged)
    with pytest.raises(
        TypeError, match="q: a nested tensor of layout torch.jagged, expected a dense one; sageattn_varlen"
    ):
        sageattention.sageattn(nested, nested, nested)
    with pytest.raises(TypeError, match="k: layout is torch.sparse_coo, expected torch.strided"):
        sageattention.sageattn(X, X.to_sparse(), X)
    with pytest.raises(TypeError, match="attn_mask: layout is torch.sparse_coo, expected torch.strided"):
        sageattention.sageattn(X, X, X, attn_mask=torch.eye(70).to_sparse())
    masked = numpy.ma.masked_array(X.numpy(), mask=False)
    with pytest.raises(TypeError, match="k: type is MaskedArray, expected a plain array"):
        sageattention.sageattn(X.numpy(), masked, X.numpy())
