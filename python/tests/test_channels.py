"""Values of other channels than keys, heads of more than 256, and one batch of keys for many of queries."""

import numpy
import pytest
import sageattention
import sageattention.sparse
import torch
import torch.nn.functional as F
from exact import TOLERANCE, assert_close, assert_lse_close, attention, random
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

# head_dim, value_dim.
CHANNELS = [(192, 128), (64, 80), (31, 512), (576, 512), (512, 512), (260, 7)]


@pytest.fixture
def computed(device, request):
    """The device, where it computes such heads."""

    def computed(head_dim, value_dim):
        from sageattention import _native

        if not _native.computes_channels(head_dim, value_dim, None if device == "cpu" else 0):
            assert device == "cuda", "the CPU computes all of them"
            pytest.skip(f"{device} has no kernel for {head_dim} and {value_dim} channels")
        return device

    return computed


def qkv(head_dim, value_dim, device, *, batches=(2, 2), q_len=60, kv_len=140, dtype=torch.float16):
    q = random(batches[0], 4, q_len, head_dim, seed=1, dtype=dtype, device=device)
    k = random(batches[1], 2, kv_len, head_dim, seed=2, dtype=dtype, device=device, bias=2.0)
    return q, k, random(batches[1], 2, kv_len, value_dim, seed=3, dtype=dtype, device=device)


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_dense(computed, channels):
    q, k, v = qkv(*channels, computed(*channels))
    for causal in (False, True):
        wanted, wanted_lse = attention(q, k, v, causal="bottom_right" if causal else None)
        out, lse = sageattention.sageattn(q, k, v, is_causal=causal, return_lse=True)
        assert out.dtype == q.dtype and out.is_contiguous()
        assert_close(out, wanted, TOLERANCE["fp8"], str(channels))
        assert_lse_close(lse, wanted_lse, str(channels))
        nhd = sageattention.sageattn(*(x.transpose(1, 2) for x in (q, k, v)), tensor_layout="NHD", is_causal=causal)
        assert_close(nhd.transpose(1, 2), wanted, TOLERANCE["fp8"], str(channels))


def test_packed(computed):
    q, k, v = (x[0].transpose(0, 1) for x in qkv(192, 128, computed(192, 128), batches=(1, 1)))
    out, lse = sageattention.sageattn_varlen(q, k, v, [0, 20, 60], [0, 90, 140], 40, 90, return_lse=True)
    assert out.shape == (60, 4, 128) and lse.shape == (4, 60)
    for rows, keys in ((slice(0, 20), slice(0, 90)), (slice(20, 60), slice(90, 140))):
        part = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        assert_close(out[rows].transpose(0, 1)[None], attention(*part)[0], TOLERANCE["fp8"])


def test_sparse(computed):
    q, k, v = qkv(128, 64, computed(128, 64), q_len=256, kv_len=256)
    predictor = sageattention.sparse.Predictor.sla(1.0)
    out = sageattention.sparse.sparse_attention(q, k, v, predictor)
    assert_close(out, attention(q, k, v)[0], TOLERANCE["fp8"])


@pytest.mark.parametrize("value_dim", [64, 48])
@pytest.mark.parametrize("shared", [(1, 1), (1, 3), (3, 1)], ids=str)
def test_one_batch_of_keys_or_values_is_every_ones(computed, shared, value_dim):
    q, k, v = qkv(64, value_dim, computed(64, value_dim), batches=(3, 3))
    k, v = k[: shared[0]], v[: shared[1]]
    copied = [x.expand(3, -1, -1, -1).contiguous() for x in (k, v)]
    mask = random(3, 1, 60, 140, seed=4, device=q.device) > -0.5
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}):
        out = sageattention.sageattn(q, k, v, **options)
        wanted = sageattention.sageattn(q, *copied, **options)
        assert_close(out, wanted.double(), 1e-3)


def test_arrays_of_numpy():
    q, k, v = (x.numpy() for x in qkv(192, 128, "cpu", dtype=torch.float32))
    out, lse = sageattention.sageattn(q, k, v, return_lse=True)
    assert type(out) is numpy.ndarray and out.shape == (2, 4, 60, 128) and lse.shape == (2, 4, 60)
    wanted = attention(*map(torch.from_numpy, (q, k, v)))[0]
    assert_close(torch.from_numpy(out), wanted, TOLERANCE["fp16"])


def test_arrays_of_jax():
    jax = pytest.importorskip("jax")
    # f32 is computed on the CPU alone, where JAX has arrays also beside a GPU.
    cpu = jax.devices("cpu")[0]
    q, k, v = (jax.device_put(x.numpy(), cpu) for x in qkv(96, 40, "cpu", dtype=torch.float32))
    out = sageattention.sageattn(q, k, v)
    wanted = attention(*(torch.from_numpy(numpy.asarray(x).copy()) for x in (q, k, v)))[0]
    assert_close(torch.from_numpy(numpy.asarray(out).copy()), wanted, TOLERANCE["fp16"])


@pytest.mark.parametrize("lie", [False, True], ids=["heads_first", "heads_side_by_side"])
def test_torchs_function_with_values_of_other_channels(computed, lie):
    q, k, v = qkv(192, 128, computed(192, 128), dtype=torch.bfloat16)
    if lie:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    sageattention.counts(reset=True)
    with sageattention.patched():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        shared = F.scaled_dot_product_attention(q, k[:1], v[:1], enable_gqa=True)
        flat = F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])
    assert sageattention.counts() == (3, {})
    assert (out.transpose(1, 2) if lie else out).is_contiguous()
    assert_close(out, attention(q, k, v, causal="top_left")[0], TOLERANCE["fp8"])
    assert_close(shared, attention(q, k[:1], v[:1])[0], TOLERANCE["fp8"])
    assert_close(flat[:, None], attention(q[:, :1], k[:, :1], v[:, :1])[0], TOLERANCE["fp8"])


def test_operators_know_the_shape_and_the_work():
    q, k, v = qkv(192, 128, "cpu", dtype=torch.float32)
    calls = {
        "dense": lambda q, k, v: sageattention.sageattn(q, k, v),
        "dense_lse": lambda q, k, v: sageattention.sageattn(q, k, v, return_lse=True)[0],
        "sparse": lambda q, k, v: sageattention.sparse.sparse_attention(
            q, k, v, sageattention.sparse.Predictor.sla(1.0)
        ),
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }
    with sageattention.patched():
        for name, call in calls.items():
            with FakeTensorMode() as mode:
                fake = call(*map(mode.from_tensor, (q, k, v)))
            with FlopCounterMode(display=False) as counter:
                out = call(q, k, v)
            assert fake.shape == out.shape == (2, 4, 60, 128) and fake.stride() == out.stride(), name
            assert counter.get_total_flops() == 2 * 2 * 4 * 60 * 140 * (192 + 128), name
        graph = torch.compile(calls["sdpa"], backend="eager", fullgraph=True)
        assert torch.equal(graph(q, k, v), out)
