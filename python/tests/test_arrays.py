"""Arrays of other libraries: the same numbers as torch's tensors, and the same kind of array back."""

import threading

import pytest
import sageattention
import torch
from exact import qkv, random

numpy = pytest.importorskip("numpy")

SHAPE = (2, 4, 2, 100, 150, 64)


def test_numpy():
    q, k, v = qkv(*SHAPE)
    mask = random(100, 150, seed=5) > 0
    wanted, wanted_lse = sageattention.sageattn(q, k, v, attn_mask=mask, return_lse=True)
    out, lse = sageattention.sageattn(*(x.numpy() for x in (q, k, v)), attn_mask=mask.numpy(), return_lse=True)
    assert type(out) is numpy.ndarray and out.dtype == numpy.float32 and lse.dtype == numpy.float32
    assert numpy.array_equal(out, wanted.numpy()) and numpy.array_equal(lse, wanted_lse.numpy())


def test_numpy_views_of_every_kind():
    q, k, v = (x.numpy() for x in qkv(2, 4, 4, 100, 100, 64))
    wanted = sageattention.sageattn(q, k, v)
    backwards = sageattention.sageattn(q[:, ::-1], k[:, ::-1], v[:, ::-1])
    assert numpy.array_equal(backwards[:, ::-1], wanted)
    fortran = sageattention.sageattn(*(numpy.asfortranarray(x) for x in (q, k, v)))
    assert numpy.array_equal(fortran, wanted)
    k.flags.writeable = False
    assert numpy.array_equal(sageattention.sageattn(q, k, v), wanted)
    # A byte that is neither 0 nor 1 is true.
    mask = numpy.full((100, 100), 7, dtype=numpy.uint8).view(bool)
    assert numpy.array_equal(sageattention.sageattn(q, k, v, attn_mask=mask), wanted)
    transposed = (numpy.random.default_rng(0).random((100, 100)) > 0.5).T
    masked = sageattention.sageattn(q, k, v, attn_mask=transposed)
    assert numpy.array_equal(masked, sageattention.sageattn(q, k, v, attn_mask=transposed.copy()))


def test_numpy_packed():
    q, k, v = (random(100, 4, 64, seed=seed) for seed in range(3))
    cu = torch.tensor([0, 40, 100])
    wanted = sageattention.sageattn_varlen(q, k, v, cu, cu, 60, 60, is_causal=True)
    out = sageattention.sageattn_varlen(*(x.numpy() for x in (q, k, v, cu, cu)), 60, 60, is_causal=True)
    assert numpy.array_equal(out, wanted.numpy())


def test_numpy_errors():
    q, k, v = (x.numpy() for x in qkv(*SHAPE))
    with pytest.raises(TypeError, match="q: dtype is float64, expected f16, bf16 or f32"):
        sageattention.sageattn(q.astype("float64"), k, v)
    with pytest.raises(TypeError, match="k: type is Tensor, expected an array of numpy, as q"):
        sageattention.sageattn(q, torch.from_numpy(k), v)
    with pytest.raises(TypeError, match="expected this machine's byte order"):
        sageattention.sageattn(q.astype(">f4"), k, v)
    with pytest.raises(ValueError, match="expected multiples of 4, the element's size"):
        rows = numpy.zeros((2, 4, 100, 64 * 4 + 2), dtype=numpy.uint8)[..., : 64 * 4].view(numpy.float32)
        sageattention.sageattn(rows, k, v)


class Placed:
    """An array of a library that speaks DLPack, which says of it where it lies."""

    shape, dtype = SHAPE[:2] + (100, 64), numpy.dtype("float32")

    def __init__(self, *device):
        self.device = device

    def __array_namespace__(self):
        return numpy

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self):
        raise AssertionError("an array was read that lies elsewhere")


def test_arrays_lie_beside_q():
    cpu, pinned, gpu, amd = Placed(1, 0), Placed(3, 0), Placed(2, 1), Placed(10, 0)
    with pytest.raises(ValueError, match="k: device is cuda:1, expected cpu, as q"):
        sageattention.sageattn(cpu, gpu, cpu)
    with pytest.raises(ValueError, match="kv_lens: device is cpu, expected cuda:1, as q"):
        sageattention.sageattn(gpu, gpu, gpu, kv_lens=cpu)
    with pytest.raises(ValueError, match="sinks: device is cuda:1, expected cuda:0, as q"):
        sageattention.sageattn(*[Placed(2, 0)] * 3, sinks=gpu)
    with pytest.raises(NotImplementedError, match="v: DLPack device is 10, expected the CPU .1. or CUDA .2."):
        sageattention.sageattn(pinned, cpu, amd)


def test_jax():
    jax = pytest.importorskip("jax")
    q, k, v = qkv(*SHAPE, dtype=torch.bfloat16)
    wanted, wanted_lse = sageattention.sageattn(q, k, v, is_causal=True, return_lse=True)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        arrays = [jax.numpy.asarray(x.float().numpy()).astype(jax.numpy.bfloat16) for x in (q, k, v)]
        before = [numpy.asarray(x) for x in arrays]
        out, lse = sageattention.sageattn(*arrays, is_causal=True, return_lse=True)
    assert isinstance(out, jax.Array) and out.dtype == jax.numpy.bfloat16
    assert numpy.array_equal(numpy.asarray(out.astype("float32")), wanted.float().numpy())
    assert numpy.array_equal(numpy.asarray(lse), wanted_lse.numpy())
    assert all(numpy.array_equal(numpy.asarray(x), y) for x, y in zip(arrays, before))


def test_what_jax_traces_is_refused():
    """Neither a graph nor a derivative would have the call."""
    jax = pytest.importorskip("jax")
    q = jax.numpy.ones((1, 2, 8, 64))
    call = lambda q: sageattention.sageattn(q, q, q)
    for transformed in (
        lambda: jax.jit(call)(q),
        lambda: jax.grad(lambda q: call(q).sum())(q),
        lambda: jax.jvp(call, (q,), (q,)),
        lambda: jax.vmap(call)(q[None]),
        lambda: jax.grad(lambda v: sageattention.sageattn(q, q, v).sum())(q),
    ):
        with pytest.raises(NotImplementedError, match="(q|v): traced by JAX .*, expected an array with values"):
            transformed()


def test_jax_on_a_gpu(cuda):
    jax = pytest.importorskip("jax")
    try:
        gpu = jax.devices("gpu")[0]
    except RuntimeError as reason:
        pytest.skip(f"JAX: {reason}")
    q, k, v = qkv(*SHAPE, dtype=torch.float16)
    arrays = [jax.device_put(x.numpy(), gpu) for x in (q, k, v)]
    out, lse = sageattention.sageattn(*arrays, return_lse=True)
    wanted, wanted_lse = sageattention.sageattn(q.to(cuda), k.to(cuda), v.to(cuda), return_lse=True)
    assert out.devices() == {gpu}
    assert numpy.array_equal(numpy.asarray(out), wanted.cpu().numpy())
    assert numpy.array_equal(numpy.asarray(lse), wanted_lse.cpu().numpy())


def test_cupy(cuda):
    cupy = pytest.importorskip("cupy")
    q, k, v = qkv(*SHAPE, dtype=torch.float16)
    wanted = sageattention.sageattn(q.to(cuda), k.to(cuda), v.to(cuda), is_causal=True).cpu().numpy()
    with cupy.cuda.Stream(non_blocking=True):
        out = sageattention.sageattn(*(cupy.asarray(x.numpy()) for x in (q, k, v)), is_causal=True)
        assert type(out) is cupy.ndarray
        assert numpy.array_equal(out.get(), wanted)


def test_threads(device):
    """Four calls at once, the lock of the interpreter released: each gets its own result, bit for bit."""
    calls = [qkv(1, 4, 2, 300 + n, 400, 64, dtype=torch.float16, device=device, seed=n) for n in range(4)]
    wanted = [sageattention.sageattn(*call, is_causal=True) for call in calls]
    failures = []

    def work(n):
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(sageattention.sageattn(*calls[n], is_causal=True), wanted[n]):
                    failures.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_interpreter_runs_on_during_a_call():
    q, k, v = qkv(1, 8, 8, 2048, 2048, 64)
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks.append(None)

    thread = threading.Thread(target=tick)
    thread.start()
    sageattention.sageattn(q, k, v)
    done.set()
    thread.join()
    # The call takes tens of milliseconds at least; a held lock would let none through.
    assert len(ticks) >= 2


def test_streams(cuda):
    """Work goes to the stream that is current, and waits for nothing."""
    calls = [qkv(1, 8, 8, 1024, 1024, 64, dtype=torch.float16, device=cuda, seed=n) for n in range(4)]
    wanted = [sageattention.sageattn(*call) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(5):
        outs = []
        for stream, call in zip(streams, calls):
            with torch.cuda.stream(stream):
                # The inputs come into being on this stream, after a long wait: on another they would be read too early.
                torch.cuda._sleep(2_000_000)
                outs.append(sageattention.sageattn(*(x.clone() for x in call)))
        assert torch.cuda.current_device() == 0
        torch.cuda.synchronize()
        assert all(torch.equal(out, x) for out, x in zip(outs, wanted))


def test_a_second_gpu(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU alone")
    call = qkv(1, 4, 4, 300, 300, 64, dtype=torch.float16, device="cuda:1")
    out = sageattention.sageattn(*call)
    assert out.device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(out.cpu(), sageattention.sageattn(*(x.to("cuda:0") for x in call)).cpu())


@pytest.mark.parametrize("function", ["sageattn", "sageattn_varlen"])
def test_cuda_graph_replays_with_changed_inputs(cuda, function):
    q, k, v = qkv(1, 256, 256, 4, 4, 64, layout="HND", dtype=torch.float16, device=cuda)
    if function == "sageattn_varlen":
        q, k, v = (x[0] for x in (q, k, v))
        cu = torch.tensor([0, 100, 256], device=cuda, dtype=torch.int32)
        call = lambda: sageattention.sageattn_varlen(q, k, v, cu, cu, 156, 156, is_causal=True)
    else:
        call = lambda: sageattention.sageattn(q, k, v, tensor_layout="NHD", is_causal=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for seed in range(3):
        for n, x in enumerate((q, k, v)):
            x.copy_(random(*x.shape, seed=100 + 3 * seed + n, dtype=torch.float16))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, call()), f"replay {seed}"
