"""torch's registry of flash-attention implementations.

torch calls it for CUDA tensors alone. Here the same functions stand behind the operators of the CPU, where torch has
none of its own, with its FlashAttention for the CPU as what they leave to it.
"""

import pytest
import sageattention
import torch
import torch.nn.functional as F
from exact import TOLERANCE, assert_close, assert_lse_close, attention, qkv, relative_l1

if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry of implementations", allow_module_level=True)
from sageattention import _flash  # noqa: E402

flash = torch.ops.aten._scaled_dot_product_flash_attention
packed_flash = torch.ops.aten._flash_attention_forward


class Theirs:
    """torch's FlashAttention for the CPU, called as its kernels for GPUs are."""

    def call_boxed(self, keys, query, key, value, *args, scale=None):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, *args[:2], scale=scale)
        state = torch.zeros(2, dtype=torch.uint64)
        return out, lse, None, None, query.shape[2], key.shape[2], state, state[0], query.new_empty(0)


class TheirPacked:
    def call_boxed(self, keys, query, key, value, cum_q, cum_k, max_q, max_k, dropout_p, causal, debug, scale, **_):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out, lse, *_, state, offset, mask = Theirs().call_boxed(keys, q, k, v, dropout_p, causal, debug, scale=scale)
        return out.transpose(1, 2), lse, state, offset, mask


class TheirsByPacked:
    """As torch's kernel for GPUs does it: by the packed operator, of tensors without gradients."""

    def call_boxed(self, keys, query, key, value, *args, scale=None):
        q, k, v = (x.detach().transpose(1, 2) for x in (query, key, value))
        lengths = (query.shape[2], key.shape[2])
        out, lse, state, offset, mask = packed_flash(q, k, v, None, None, *lengths, *args, scale=scale)
        return out.transpose(1, 2), lse, None, None, *lengths, state, offset, mask


class TheirBackward:
    def call_boxed(
        self, keys, grad_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, causal, *_, scale=None
    ):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, dropout_p, causal, scale=scale
        )


@pytest.fixture(params=[Theirs, TheirsByPacked])
def on_cpu(request):
    library = torch.library.Library("aten", "IMPL", "CPU")
    for operator, make, theirs in (
        ("_scaled_dot_product_flash_attention", _flash.forward_of, request.param()),
        ("_flash_attention_forward", _flash.packed_forward_of, TheirPacked()),
        ("_scaled_dot_product_flash_attention_backward", _flash.backward_of, TheirBackward()),
    ):
        library.impl(operator, make(theirs, None), "CPU", with_keyset=True)
    sageattention.counts(reset=True)
    yield
    library._destroy()


@pytest.fixture
def active(cuda):
    sageattention.register_flash_attention()
    torch.nn.attention.activate_flash_attention_impl("sage")
    sageattention.counts(reset=True)
    yield cuda
    torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.parametrize("causal", [False, True])
def test_the_operator(on_cpu, causal):
    q, k, v = qkv(2, 4, 2, 70, 90, 64, dtype=torch.bfloat16)
    out, lse, _, _, max_q, max_k, *_ = flash(q, k, v, 0.0, causal, scale=0.2)
    wanted, wanted_lse = attention(q, k, v, causal="bottom_right" if causal else None, scale=0.2)
    assert_close(out, wanted, TOLERANCE["fp16"] + 2**-8)
    assert_lse_close(lse, wanted_lse)
    assert (max_q, max_k) == (70, 90) and sageattention.counts() == (1, {})


def test_the_operator_of_packed_sequences(on_cpu):
    q, k, v = (x[0] for x in qkv(1, 2, 2, 100, 100, 64, layout="NHD", dtype=torch.bfloat16))
    ends = torch.tensor([0, 30, 100], dtype=torch.int32)
    out, lse, *_ = packed_flash(q, k, v, ends, ends, 70, 70, 0.0, True, False, window_size_left=20, window_size_right=0)
    for start, end in ((0, 30), (30, 100)):
        parts = [x[None, start:end] for x in (q, k, v)]
        wanted, wanted_lse = attention(*parts, layout="NHD", causal="bottom_right", window=(20, 0))
        assert_close(out[None, start:end], wanted, TOLERANCE["fp16"] + 2**-8)
        assert_lse_close(lse[None, :, start:end], wanted_lse)
    dense = [x[None] for x in (q, k, v)]
    out, lse, *_ = packed_flash(
        *dense, None, None, 100, 100, 0.0, False, False, window_size_left=-1, window_size_right=-1
    )
    wanted, wanted_lse = attention(*dense, layout="NHD")
    assert_close(out, wanted, TOLERANCE["fp16"] + 2**-8)
    assert_lse_close(lse, wanted_lse)


def test_what_is_left_to_torch(on_cpu):
    q, k, v = (x.float() for x in qkv(1, 2, 2, 40, 40, 64))
    with torch.enable_grad():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        flash(*leaves)[0].sum().backward()
    wanted = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        F.scaled_dot_product_attention(*wanted).sum().backward()
    assert all(relative_l1(x.grad, y.grad.double()) < 1e-5 for x, y in zip(leaves, wanted))
    assert sageattention.counts() == (0, {"a tensor requires its gradient, and there is no backward pass yet": 1})


def test_a_backward_pass_after_ours_is_refused(on_cpu):
    q, k, v = qkv(1, 2, 2, 40, 40, 64, dtype=torch.bfloat16)
    out, lse, cum_q, cum_k, max_q, max_k, state, offset, _ = flash(q, k, v)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    empty = torch.empty(0)
    with pytest.raises(NotImplementedError, match="there is no backward pass yet"):
        backward(out, q, k, v, out, lse, empty, empty, max_q, max_k, 0.0, False, state, offset)


def test_it_is_registered_with_torch():
    sageattention.register_flash_attention("sage of a test", scheme="full")
    assert "sage of a test" in torch.nn.attention.list_flash_attention_impls()
    with pytest.raises(ValueError, match="scheme: value is sage9, expected one of full, int8"):
        sageattention.register_flash_attention(scheme="sage9")


def test_activating_and_restoring_leaves_torch_as_it_was():
    """Kernels for GPUs can be exchanged without one."""
    try:
        before = repr(torch.library.get_kernel("aten::_flash_attention_forward", "CUDA"))
    except RuntimeError:
        pytest.skip("this torch is built without CUDA")
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    sageattention.register_flash_attention()
    torch.nn.attention.activate_flash_attention_impl("sage")
    assert torch.nn.attention.current_flash_attention_impl() == "sage"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert repr(torch.library.get_kernel("aten::_flash_attention_forward", "CUDA")) != before
    torch.nn.attention.restore_flash_attention_impl()
    assert repr(torch.library.get_kernel("aten::_flash_attention_forward", "CUDA")) == before
    assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn


@pytest.mark.parametrize("compiled", [False, True])
def test_torch_s_function_on_a_gpu(active, compiled):
    q, k, v = qkv(2, 4, 4, 200, 200, 64, dtype=torch.bfloat16, device=active)
    function = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_close(function(q, k, v), attention(q, k, v, causal="top_left")[0], TOLERANCE["fp16"] + 2**-8)
    assert sageattention.counts() == (1, {})
    with torch.enable_grad():
        leaf = q.clone().requires_grad_()
        F.scaled_dot_product_attention(leaf, k, v).sum().backward()
    assert leaf.grad is not None and sageattention.counts().accelerated == 1
    torch.nn.attention.restore_flash_attention_impl()
    F.scaled_dot_product_attention(q, k, v)
    assert sageattention.counts().accelerated == 1


def test_variable_lengths_on_a_gpu(active):
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0] for x in qkv(1, 2, 2, 100, 100, 64, layout="NHD", dtype=torch.bfloat16, device=active))
    ends = torch.tensor([0, 30, 100], dtype=torch.int32, device=active)
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.FLASH_ATTENTION]):
        out = varlen_attn(q, k, v, ends, ends, 70, 70)
    for start, end in ((0, 30), (30, 100)):
        wanted = attention(*(x[None, start:end] for x in (q, k, v)), layout="NHD")[0]
        assert_close(out[None, start:end], wanted, TOLERANCE["fp16"] + 2**-8)
    assert sageattention.counts() == (1, {})
