"""torch.compile, torch.export and the operators' own contract."""

import shutil

import pytest
import sageattention
import torch
from exact import qkv, random, relative_l1
from model import transformer
from sageattention import _torch
from sageattention._request import Request


def attention(q, k, v):
    return sageattention.sageattn(q, k, v, tensor_layout="NHD", is_causal=True)


def with_lse(q, k, v):
    return sageattention.sageattn(q, k, v, tensor_layout="NHD", is_causal=True, return_lse=True)[0]


def named(q, k, v):
    return sageattention.sageattn_qk_int8_pv_fp16_cuda(q, k, v, tensor_layout="NHD", is_causal=True)


def through_sdpa(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def dtype_of(device):
    return torch.float16 if device == "cuda" else torch.float32


@pytest.mark.parametrize("function", [attention, with_lse, named, through_sdpa])
def test_no_graph_break_and_the_same_bits_as_eager(device, function):
    model = transformer(function, device, dtype_of(device))
    x = random(2, 90, 64, seed=0, dtype=dtype_of(device), device=device)
    with sageattention.patched():
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(x)
        assert explained.graph_count == 1 and explained.graph_break_count == 0, explained.break_reasons
        eager = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, eager)
    if function is through_sdpa:
        assert not torch.equal(eager, model(x)), "the replaced function was not used"


def test_inductor(device):
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("no C compiler for torch's inductor")
    model = transformer(attention, device, dtype_of(device))
    compiled = torch.compile(model, fullgraph=True)
    for length in (90, 90, 131):
        x = random(2, length, 64, seed=length, dtype=dtype_of(device), device=device)
        # Fused operations around ours round otherwise, and a last bit of Q can be another integer.
        assert relative_l1(compiled(x), model(x).double()) < 5e-3


def test_reduce_overhead(cuda):
    model = transformer(attention, cuda, torch.float16)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        x = random(2, 128, 64, seed=seed, dtype=torch.float16, device=cuda)
        torch.compiler.cudagraph_mark_step_begin()
        assert relative_l1(compiled(x).clone(), model(x).double()) < 5e-3


@pytest.mark.parametrize("function", [attention, with_lse])
def test_export(device, function):
    model = transformer(function, device, dtype_of(device))
    x = random(2, 90, 64, seed=0, dtype=dtype_of(device), device=device)
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(model, (x,), dynamic_shapes=({1: length},))
    assert any("sageattention" in str(node.target) for node in exported.graph.nodes)
    longer = random(2, 150, 64, seed=1, dtype=dtype_of(device), device=device)
    assert torch.equal(exported.module()(longer), model(longer))


def test_fake_and_real_outputs_agree(device):
    dtype = dtype_of(device)
    q, k, v = qkv(2, 4, 2, 40, 50, 64, layout="NHD", dtype=dtype, device=device)
    request = Request(tensor_layout="NHD", is_causal=True)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator in (_torch._dense_op, _torch._dense_lse_op):
        for sinks, lens in ((None, None), (torch.zeros(4, device=device), torch.tensor([50, 7], device=device))):
            dense = (q, k, v, None, sinks, lens, None, 0, 0, *request)
            torch.library.opcheck(operator.overload, dense, test_utils=checks)
    cu = torch.tensor([0, 15, 40], dtype=torch.int32, device=device)
    packed = (q[0], k[0, :40], v[0, :40], torch.zeros(4, device=device), cu, cu, 25, 25, *Request())
    for operator in (_torch._varlen_op, _torch._varlen_lse_op):
        torch.library.opcheck(operator.overload, packed, test_utils=checks)

    from sageattention import _sdpa

    fused = random(2, 40, 3, 4, 64, seed=0, dtype=dtype, device=device)
    for heads_first in (
        [x.transpose(1, 2) for x in fused.unbind(2)],
        qkv(2, 4, 4, 40, 40, 64, dtype=dtype, device=device),
    ):
        torch.library.opcheck(_sdpa._sdpa_op.overload, (*heads_first, None, True, None, None), test_utils=checks)


def test_the_meta_device_gives_shapes():
    x = torch.empty(2, 4, 10, 64, device="meta", dtype=torch.float16)
    out, lse = sageattention.sageattn(x, x, x, return_lse=True)
    assert out.shape == x.shape and out.dtype == x.dtype and lse.shape == (2, 4, 10)


def test_gradients_are_refused_under_compile(device):
    model = transformer(attention, device, dtype_of(device))
    x = random(2, 30, 64, seed=0, dtype=dtype_of(device), device=device)
    with torch.enable_grad(), pytest.raises(Exception, match="requires_grad is True, expected False"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
