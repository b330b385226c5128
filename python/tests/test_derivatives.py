"""Derivatives are refused, or left to torch, and never silently zero."""

import pytest
import sageattention
import torch
import torch.nn.functional as F
from exact import TOLERANCE, assert_close, attention, qkv
from sageattention.sparse import Predictor, sparse_attention
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

Q, K, V = qkv(1, 2, 2, 20, 30, 64)
MASK = torch.zeros(20, 30)
TANGENT = "a tensor has a tangent, and forward-mode derivatives are not computed"

FUNCTIONS = {
    "sageattn": sageattention.sageattn,
    "lse": lambda *qkv: sageattention.sageattn(*qkv, return_lse=True)[1],
    "fp16_cuda": sageattention.sageattn_qk_int8_pv_fp16_cuda,
    "varlen": lambda q, k, v: sageattention.sageattn_varlen(
        q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1), [0, 20], [0, 30], None, None
    ),
    "sparse": lambda q, k, v: sparse_attention(q, k, v, Predictor.sla(0.5)),
    "mask": lambda q, k, v: sageattention.sageattn(Q, K, V, attn_mask=q[0, 0, :, :1] + MASK),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_forward_mode_is_refused(function):
    message = "(q|attn_mask): has a tangent, expected none: forward-mode derivatives"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda q: function(q, K, V), (Q,), (torch.ones_like(Q),))
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jacfwd(lambda q: function(q, K, V).sum())(Q)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        function(forward_ad.make_dual(Q, torch.ones_like(Q)), K, V)
    with forward_ad.dual_level():
        # A level alone is no derivative.
        function(Q, K, V)


@pytest.mark.parametrize("function", list(FUNCTIONS.values())[:5], ids=list(FUNCTIONS)[:5])
def test_reverse_mode_through_functions_is_refused(function):
    for derivative in (
        torch.func.grad(lambda q: function(q, K, V).sum()),
        torch.func.jacrev(lambda q: function(q, K, V)),
    ):
        with pytest.raises(NotImplementedError, match="q: requires_grad is True"):
            derivative(Q)


def test_a_patched_function_leaves_derivatives_to_torch():
    tangent = torch.ones_like(Q)

    def call(q):
        return F.scaled_dot_product_attention(q, K, V)

    # torch's other kernels for the CPU have no forward mode either.
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(call, (Q,), (tangent,))[1]
        gradient = torch.func.grad(lambda q: call(q).sum())(Q)
    sageattention.counts(reset=True)
    with sageattention.patched():
        with pytest.raises(NotImplementedError, match="forward AD"):
            torch.func.jvp(call, (Q,), (tangent,))
        assert sageattention.counts().fallbacks == {TANGENT: 1}
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(torch.func.jvp(call, (Q,), (tangent,))[1], wanted)
        assert wanted.any()
        assert torch.allclose(torch.func.grad(lambda q: call(q).sum())(Q), gradient, atol=1e-5)
    assert sageattention.counts().accelerated == 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_computes_each(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = (x.to(device=device, dtype=dtype) for x in qkv(3, 2, 2, 20, 30, 64))
    wanted = attention(q, k, v)[0]
    with sageattention.patched():
        for function in (sageattention.sageattn, F.scaled_dot_product_attention):
            found = torch.func.vmap(function)(q[:, None], k[:, None], v[:, None])
            assert_close(found[:, 0], wanted, TOLERANCE["fp16"])
