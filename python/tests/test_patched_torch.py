"""What else of torch looks at the replaced function: its kernels' switches, subclasses, modes, counters, scripts."""

import pytest
import sageattention
import torch
import torch.nn.functional as F
from exact import TOLERANCE, assert_close, attention, qkv, random, relative_l1
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

torch_sdpa = F.scaled_dot_product_attention
SELECTED = "backends of torch's own are selected (sdpa_kernel, or torch.backends.cuda.enable_..._sdp)"


@pytest.fixture(autouse=True)
def patched():
    sageattention.counts(reset=True)
    with sageattention.patched():
        yield


def half(device):
    return torch.float16 if device == "cuda" else torch.float32


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_a_selection_of_torch_s_kernels_is_the_user_s(device):
    q, k, v = qkv(1, 2, 2, 20, 20, 64, dtype=half(device), device=device)

    def within(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)

    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch_sdpa(q, k, v)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), wanted)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        F.scaled_dot_product_attention(q, k, v)
    assert sageattention.counts(reset=True) == (0, {SELECTED: 2})
    assert relative_l1(compiled(within)(q, k, v), wanted.double()) < 2e-3
    assert sageattention.counts(reset=True) == (0, {SELECTED: 1})
    # cuDNN's alone is off on many machines, and a priority among all selects none.
    everything = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(everything):
        F.scaled_dot_product_attention(q, k, v)
    F.scaled_dot_product_attention(q, k, v)
    assert sageattention.counts() == (2, {})


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_torch_s_own_causal_biases(device, make):
    q, k, v = qkv(1, 2, 2, 8, 12, 64, dtype=half(device), device=device)
    bias = make(8, 12)
    alignment = "top_left" if make is causal_upper_left else "bottom_right"
    wanted = attention(q, k, v, causal=alignment)[0]
    call = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    assert_close(call(q, k, v), wanted, TOLERANCE["fp16"])
    assert_close(sageattention.sageattn(q, k, v, attn_mask=bias), wanted, TOLERANCE["fp16"])
    # As in a module that has imported the function before.
    assert_close(torch_sdpa(q, k, v, attn_mask=bias), wanted, TOLERANCE["fp16"])
    # Not one graph everywhere: torch's own code for GPUs may break it.
    assert_close(torch.compile(call, backend="aot_eager")(q, k, v), wanted, TOLERANCE["fp16"])


class Recording(TorchFunctionMode):
    """Answers in the function's place with its values, as diffusers' guidance that skips attention scores does."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return args[2]
        return function(*args, **(kwargs or {}))


def test_modes_see_the_call(device):
    q, k, v = qkv(1, 2, 2, 20, 20, 64, dtype=half(device), device=device)
    call = lambda q, k, v: F.scaled_dot_product_attention(q, k, v)
    with Recording():
        assert call(q, k, v) is v
        assert torch.equal(compiled(call)(q, k, v), v)
    assert sageattention.counts() == (0, {})
    # A default device is such a mode too, and leaves the call alone.
    with torch.device(device):
        assert_close(call(q, k, v), attention(q, k, v)[0], TOLERANCE["fp16"])
        assert_close(compiled(call)(q, k, v), attention(q, k, v)[0], TOLERANCE["fp16"])
    assert sageattention.counts() == (2, {})


class Named(torch.Tensor):
    """A subclass that leaves everything to torch."""


class Answering(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return "answered"
        return super().__torch_function__(function, types, args, kwargs)


def test_subclasses_see_the_call(device):
    q, k, v = qkv(1, 2, 2, 20, 20, 64, dtype=half(device), device=device)
    assert F.scaled_dot_product_attention(q, k.as_subclass(Answering), v) == "answered"
    mask = torch.zeros(20, 20, dtype=q.dtype, device=device)
    assert F.scaled_dot_product_attention(q, k, v, attn_mask=mask.as_subclass(Answering)) == "answered"
    found = F.scaled_dot_product_attention(q.as_subclass(Named), k, v)
    assert type(found) is Named and torch.equal(found.as_subclass(torch.Tensor), torch_sdpa(q, k, v))
    assert sageattention.counts() == (0, {"a tensor is of a subclass of torch.Tensor": 1})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_left_to_torch(layout):
    rows = [random(5, 4, 64, seed=0), random(7, 4, 64, seed=1)]
    x = torch.nested.nested_tensor(rows, layout=layout).transpose(1, 2)
    if layout is torch.strided:
        x = x.contiguous()
    found, wanted = F.scaled_dot_product_attention(x, x, x), torch_sdpa(x, x, x)
    assert all(torch.equal(*pair) for pair in zip(found.unbind(), wanted.unbind()))
    assert sageattention.counts() == (0, {"a tensor is not strided": 1})


def test_floating_point_operations_are_counted_as_torch_counts(device):
    q, k, v = qkv(2, 4, 2, 30, 50, 64, dtype=half(device), device=device)
    wanted = 4 * 2 * 4 * 30 * 50 * 64

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    full = [x.repeat_interleave(2, 1) for x in (k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        assert flops(lambda: torch_sdpa(q, *full)) == wanted
    assert flops(lambda: F.scaled_dot_product_attention(q, *full)) == wanted
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)) == wanted
    assert flops(lambda: sageattention.sageattn(q, k, v)) == wanted
    assert flops(lambda: sageattention.sageattn(q, k, v, return_lse=True)) == wanted
    heads_inside = [x.transpose(1, 2) for x in (q, k, v)]
    assert flops(lambda: sageattention.sageattn(*heads_inside, tensor_layout="NHD")) == wanted
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    lengths = [0, 10, 30], [0, 45, 50], 20, 45
    assert flops(lambda: sageattention.sageattn_varlen(*packed, *lengths)) == 4 * 4 * 64 * (10 * 45 + 20 * 5)


@pytest.mark.filterwarnings("ignore")  # torch's, that both are deprecated, and a trace's, that it holds for one shape
def test_scripts_have_torch_s_function_and_traces_ours(device):
    q, k, v = qkv(1, 2, 2, 20, 20, 64, dtype=half(device), device=device)

    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    scripted = torch.jit.script(Attention())
    assert torch.equal(scripted(q, k, v), torch_sdpa(q, k, v, is_causal=True))
    assert sageattention.counts() == (0, {})
    traced = torch.jit.trace(Attention(), (q, k, v))
    assert any(node.kind() == "sageattention::sdpa" for node in traced.graph.nodes())


def test_symbolic_traces_call_ours(device):
    q, k, v = qkv(1, 2, 2, 20, 20, 64, dtype=half(device), device=device)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    traced = torch.fx.symbolic_trace(Attention())
    assert sageattention.counts(reset=True) == (0, {})
    assert_close(traced(q, k, v), attention(q, k, v, causal="top_left")[0], TOLERANCE["fp16"])
    assert sageattention.counts() == (1, {})


def test_the_fast_path_of_multi_head_attention_is_off_while_patched(device):
    dtype = half(device)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2).to(device=device, dtype=dtype).eval()
    x = random(2, 30, 64, seed=0, dtype=dtype, device=device)
    padded = torch.zeros(2, 30, dtype=torch.bool, device=device)
    padded[1, 20:] = True
    found, masked = encoder(x), encoder(x, src_key_padding_mask=padded)
    assert sageattention.counts() == (4, {})
    torch.backends.mha.set_fastpath_enabled(True)
    encoder(x)
    assert sageattention.counts() == (4, {}), "the user's switch"
    torch.backends.mha.set_fastpath_enabled(False)
    sageattention.unpatch()
    assert torch.backends.mha.get_fastpath_enabled()
    assert relative_l1(found, encoder(x).double()) < 0.01
    wanted = encoder(x, src_key_padding_mask=padded)
    assert relative_l1(masked[~padded], wanted[~padded].double()) < 0.01


def test_the_fast_path_is_put_back_as_it_was():
    sageattention.unpatch()
    for before in (True, False):
        torch.backends.mha.set_fastpath_enabled(before)
        sageattention.patch()
        sageattention.patch("full")
        with sageattention.patched():
            assert not torch.backends.mha.get_fastpath_enabled()
        sageattention.unpatch()
        sageattention.unpatch()
        assert torch.backends.mha.get_fastpath_enabled() is before
    torch.backends.mha.set_fastpath_enabled(True)
