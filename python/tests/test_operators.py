"""Calls that skip torch's dispatcher, and all those that see operators there."""

import pytest
import sageattention
import torch
import torch.nn.functional as F
from exact import qkv
from sageattention import _sdpa, _torch
from sageattention._operators import is_plain
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FUNCTIONS = {
    "dense": lambda q, k, v: sageattention.sageattn(q, k, v, is_causal=True),
    "dense_lse": lambda q, k, v: sageattention.sageattn(q, k, v, tensor_layout="NHD", return_lse=True)[1],
    "varlen": lambda q, k, v: sageattention.sageattn_varlen(
        *(x.flatten(0, 1).transpose(0, 1) for x in (q, k, v)), *cu_seqlens(q, k), q.shape[2], k.shape[2]
    ),
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
}


def cu_seqlens(*tensors):
    return [torch.tensor([0, x.shape[2]], dtype=torch.int32, device=x.device) for x in tensors]


def tensors(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    return qkv(1, 4, 4, 20, 20, 64, dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def patched():
    with sageattention.patched():
        yield


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class RecordingFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_whoever_looks_sees_the_operator(device, name):
    q, k, v = tensors(device)
    function = FUNCTIONS[name]
    unseen = function(q, k, v)
    with Recording() as dispatched:
        assert torch.equal(function(q, k, v), unseen)
    assert f"sageattention::{name}" in dispatched.names
    with RecordingFunctions() as functions:
        assert torch.equal(function(q, k, v), unseen)
    # Modes see the replaced function by its own name.
    wanted = "scaled_dot_product_attention" if name == "sdpa" else f"sageattention.{name}.default"
    assert any(wanted in seen for seen in functions.names)
    with torch.profiler.profile() as profile:
        assert torch.equal(function(q, k, v), unseen)
    assert f"sageattention::{name}" in {event.name for event in profile.events()}
    with FakeTensorMode() as mode:
        assert function(*map(mode.from_tensor, (q, k, v))).shape == unseen.shape
    traced = make_fx(function)(q, k, v)
    assert any(f"sageattention.{name}" in str(node.target) for node in traced.graph.nodes)
    assert torch.equal(traced(q, k, v), unseen)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nobody_else_pays_for_it(device, name, monkeypatch):
    def refuse(*_):
        raise AssertionError("the dispatcher was called")

    q, k, v = tensors(device)
    module = _sdpa if name == "sdpa" else _torch
    operator = getattr(module, f"_{name}_op")
    monkeypatch.setattr(module, f"_{name}_op", operator._replace(overload=refuse))
    FUNCTIONS[name](q, k, v)
    with torch.inference_mode():
        FUNCTIONS[name](q, k, v)
    with torch.autocast(device, dtype=torch.bfloat16):
        FUNCTIONS[name](q, k, v)


def test_what_is_plain(device):
    q, k, v = tensors(device)
    assert is_plain(q, k, v, None) and is_plain(q.transpose(1, 2), k[:, :, ::2], v.expand(2, 4, 20, 64))
    with torch.inference_mode():
        assert is_plain(q, torch.empty_like(k), v)
    for other in (
        q.clone().requires_grad_(),
        torch.nn.Parameter(q),
        torch._neg_view(q),
        torch._efficientzerotensor(q.shape, dtype=q.dtype, device=device),
        q.to("meta"),
        q[0, 0].to_sparse(),
        torch.nested.nested_tensor([q[0], q[0]]),
        [1],
    ):
        assert not is_plain(q, k, other)
        assert not is_plain(other, k, v)
    if device == "cuda":
        assert not is_plain(q, k.cpu(), v)


def test_tensors_without_numbers_of_their_own_are_resolved(device):
    q, k, v = tensors(device)
    zero = torch._efficientzerotensor(q.shape, dtype=q.dtype, device=device)
    for function in (sageattention.sageattn, F.scaled_dot_product_attention):
        assert torch.equal(function(torch._neg_view(q), k, v), function(-q, k, v))
        assert torch.equal(function(zero, k, v), function(torch.zeros_like(q), k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dtypes_are_called_what_torch_calls_them(device, dtype):
    q, k, v = (x.to(dtype) for x in tensors(device))
    with pytest.raises(TypeError, match=f"q: dtype is {str(dtype).removeprefix('torch.')}, expected"):
        sageattention.sageattn(q, k, v)


def test_torch_before_2_10_has_no_table_of_dlpack(device, monkeypatch):
    q, k, v = tensors(device)
    wanted = {name: function(q, k, v) for name, function in FUNCTIONS.items()}
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    for name, function in FUNCTIONS.items():
        assert torch.equal(function(q, k, v), wanted[name])
    mask = torch.ones(20, 20, dtype=torch.bool, device=device)
    assert torch.equal(sageattention.sageattn(q, k, v, attn_mask=mask), sageattention.sageattn(q, k, v))
    with pytest.raises(TypeError, match="q: dtype is float64, expected"):
        sageattention.sageattn(q.double(), k, v)
