"""Key lengths: the first keys of each entry of the batch, and nothing of what lies behind them."""

from functools import partial

import numpy
import pytest
import sageattention
import sageattn3
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, assert_same, attention, local, qkv, random, relative_l1
from sageattention import sageattn
from sageattention.sparse import Predictor, predict_blocks, sparse_attention
from spas_sage_attn import block_sparse_sage2_attn_cuda, spas_sage2_attn_meansim_topk_cuda
from test_keywords import DENSE
from test_sinks import with_sinks

LENS = [150, 37, 0, 64]
SINKS = [-2.0, 1.0, 4.0, float("-inf"), 7.0, 0.5]


def dtype_of(device):
    return torch.float16 if device == "cuda" else torch.float32


def padded(device, q_len=90, lens=LENS, layout="HND", head_dim=64):
    """q, k and v of which the keys and values behind each length are no numbers."""
    q, k, v = qkv(len(lens), 6, 2, q_len, 150, head_dim, layout=layout, dtype=dtype_of(device), device=device)
    for x in (k, v):
        for entry, length in zip(x if layout == "HND" else x.transpose(1, 2), lens):
            entry[:, length:] = float("nan")
    return q, k, v


def each(q, k, v, lens=LENS, mask=None):
    """The entries of the batch with as many keys as they have, and the mask's part for them."""
    for b, length in enumerate(lens):
        own = None if mask is None else mask.expand(len(lens), -1, -1, -1)[b : b + 1, ..., :length]
        yield b, length, (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length]), own


def check(found, q, k, v, *, lens=LENS, tolerance=TOLERANCE["fp16"], mask=None, sinks=None, **exact):
    """A pair of output and log-sum-exp against exact attention of each entry by itself."""
    out, lse = found
    for b, length, tensors, own in each(q, k, v, lens, mask):
        wanted, wanted_lse = attention(*tensors, mask=own, **exact)
        if sinks is not None:
            wanted, wanted_lse = with_sinks(wanted, wanted_lse, sinks)
        if length == 0:
            assert not out[b].any(), b
        else:
            assert_close(out[b : b + 1], wanted, tolerance, f"entry {b}")
        assert_lse_close(lse[b : b + 1], wanted_lse, f"entry {b}")


@pytest.mark.parametrize("causal", [None, "bottom_right", "top_left"])
@pytest.mark.parametrize("scheme", [None, "full", "sage2-int8-fp16-per-thread"])
def test_each_entry_has_its_own_keys(device, scheme, causal):
    q, k, v = padded(device)
    options = {"scheme": scheme, "is_causal": causal is not None, "causal_alignment": causal or "bottom_right"}
    found = sageattn(q, k, v, kv_lens=LENS, return_lse=True, **options)
    check(found, q, k, v, causal=causal)
    assert torch.equal(sageattn(q, k, v, kv_lens=LENS, **options), found[0])
    if scheme is not None:
        # Left open, fewer keys may be another scheme's.
        for b, _, tensors, _ in each(q, k, v):
            assert_same(found[0][b : b + 1], sageattn(*tensors, **options))


def test_both_layouts_and_one_query(device):
    for layout in ("HND", "NHD"):
        q, k, v = padded(device, 1, layout=layout)
        out = sageattn(q, k, v, layout, True, kv_lens=LENS)
        if layout == "NHD":
            q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
        for b, length, tensors, _ in each(q, k, v):
            if length:
                assert_close(out[b : b + 1], attention(*tensors)[0], TOLERANCE["fp16"], f"{layout}, entry {b}")
            else:
                assert not out[b].any()


@pytest.mark.parametrize("name", ["mask", "bias", "window", "softcap", "sinks", "all"])
def test_together_with_other_options(device, name):
    q, k, v = padded(device)
    generator = torch.Generator().manual_seed(5)
    mask = (torch.rand(4, 1, 90, 150, generator=generator) < 0.8).to(device)
    bias = torch.randn(90, 150, generator=generator).to(device=device, dtype=q.dtype)[None, None]
    sinks = torch.tensor(SINKS, device=device)
    options, exact = {
        "mask": ({"attn_mask": mask}, {"mask": mask}),
        "bias": ({"attn_mask": bias, "is_causal": True}, {"mask": bias, "causal": "bottom_right"}),
        "window": ({"window": (20, 5)}, {"window": (20, 5)}),
        "softcap": ({"logit_softcap": 4.0}, {"softcap": 4.0}),
        "sinks": ({"sinks": sinks, "is_causal": True}, {"sinks": sinks, "causal": "bottom_right"}),
        "all": (
            {"attn_mask": mask, "window": (40, 0), "softcap": 4.0, "s_aux": sinks, "scale": 0.2},
            {"mask": mask, "window": (40, 0), "softcap": 4.0, "sinks": sinks, "scale": 0.2},
        ),
    }[name]
    check(sageattn(q, k, v, kv_lens=LENS, return_lse=True, **options), q, k, v, **exact)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_every_function_has_lengths_and_sinks(device, name, causal):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    q, k, v = padded(device)
    sinks = torch.tensor(SINKS, device=device)
    options = {"is_causal": causal, "kv_lens": LENS, "sinks": sinks, "return_lse": True}
    found = DENSE[name](q, k, v, **options)
    exact = {"causal": "bottom_right" if causal else None, "sinks": sinks}
    check(found, q, k, v, tolerance=TOLERANCE["fp8"], **exact)


@pytest.mark.parametrize("function", [sageattn3.sageattn3_blackwell, sageattn3.sageattn_blackwell])
def test_fp4_has_lengths_and_sinks(function):
    q, k, v = padded("cpu")
    sinks = torch.tensor(SINKS)
    compute = partial(function, fp4=True, is_causal=True, return_lse=True)
    out, lse = compute(q, k, v, kv_lens=LENS)
    for b, _, tensors, _ in each(q, k, v):
        wanted, wanted_lse = compute(*tensors)
        assert torch.equal(out[b : b + 1], wanted) and torch.equal(lse[b : b + 1], wanted_lse)
    # What FP4 costs is much, but a sink is no part of it.
    found, found_lse = compute(q, k, v, kv_lens=LENS, sinks=sinks)
    wanted, wanted_lse = with_sinks(out.double(), lse.double(), sinks)
    assert relative_l1(found, wanted) < 1e-5
    assert torch.allclose(found_lse.double(), wanted_lse, atol=1e-5)


@pytest.mark.parametrize(
    "predictor", [Predictor.sla(0.4), Predictor.sparge_attn(topk=0.4, simthreshd1=0.1)], ids=["sla", "sparge"]
)
def test_blocks_are_predicted_from_an_entry_s_own_keys(device, predictor):
    lens = [420, 130, 0]
    q, k, v = local(3, 6, 2, 300, 420, 64, dtype=dtype_of(device), device=device, sharp=1.2)
    sinks = torch.tensor(SINKS, device=device)
    options = {"scheme": "full", "sinks": sinks, "return_lse": True, "return_map": True}
    out, lse, blocks = sparse_attention(q, k, v, predictor, kv_lens=lens, **options)
    assert torch.equal(blocks, predict_blocks(q, k, predictor, kv_lens=torch.tensor(lens, device=device)))
    for b, length, tensors, _ in each(q, k, v, lens):
        wanted, wanted_lse, own = sparse_attention(*tensors, predictor, **options)
        assert torch.equal(blocks[b, ..., : own.shape[-1]], own[0]) and not blocks[b, ..., own.shape[-1] :].any()
        assert_same(out[b : b + 1], wanted)
        assert torch.allclose(lse[b : b + 1], wanted_lse, atol=2e-3)
        assert length or not out[b].any()


def test_sparsity_is_of_the_blocks_that_there_are(device):
    lens = [420, 130]
    q, k, v = local(2, 6, 2, 300, 420, 64, dtype=dtype_of(device), device=device, sharp=1.2)
    options = {"topk": 1.0, "simthreshd1": -1.0, "return_sparsity": True}
    _, left_out = spas_sage2_attn_meansim_topk_cuda(q, k, v, kv_lens=lens, **options)
    assert left_out == 0.0
    _, left_out = spas_sage2_attn_meansim_topk_cuda(q, k, v, kv_lens=torch.tensor(lens), **{**options, "topk": 0.5})
    assert 0.3 < left_out < 0.7
    # Of a map that is given all blocks count, as under a causal mask.
    blocks = torch.ones(2, 6, 3, 7, device=device)
    out, left_out = block_sparse_sage2_attn_cuda(q, k, v, blocks, kv_lens=lens, return_sparsity=True)
    assert left_out == 0.0
    assert_close(out[1:], attention(q[1:], k[1:, :, :130], v[1:, :, :130])[0], TOLERANCE["fp8"])


def test_lengths_come_in_many_forms(device):
    q, k, v = padded(device)
    wanted = sageattn(q, k, v, is_causal=True, kv_lens=LENS)
    forms = [tuple(LENS), numpy.array(LENS), numpy.array(LENS, dtype=numpy.int32), [numpy.int64(n) for n in LENS]]
    for where in {"cpu", device}:
        forms += [torch.tensor(LENS, device=where, dtype=dtype) for dtype in (torch.int32, torch.int64)]
        forms.append(torch.tensor([LENS, LENS], device=where, dtype=torch.int32).T.flatten()[::2])
    for kv_lens in forms:
        assert torch.equal(sageattn(q, k, v, is_causal=True, kv_lens=kv_lens), wanted)
    for name in ("seqused_k", "cache_seqlens"):
        assert torch.equal(sageattn(q, k, v, causal=True, **{name: torch.tensor(LENS, device=device)}), wanted)
    whole = sageattn(q[:1], k[:1], v[:1])
    assert torch.equal(sageattn(q[:1], k[:1], v[:1], kv_lens=[150]), whole)
    # One batch of keys that is every entry's, of which each sees its own part.
    shared = sageattn(q, k[:1], v[:1], kv_lens=LENS, return_lse=True)
    check(shared, q, k[:1].expand(4, -1, -1, -1), v[:1].expand(4, -1, -1, -1))


def test_arrays():
    q, k, v = padded("cpu")
    wanted = sageattn(q, k, v, is_causal=True, kv_lens=LENS).numpy()
    arrays = [x.numpy() for x in (q, k, v)]
    for kv_lens in (LENS, tuple(LENS), numpy.array(LENS), numpy.array(LENS, dtype=numpy.int32)[::1]):
        assert numpy.array_equal(sageattn(*arrays, is_causal=True, kv_lens=kv_lens), wanted)
    predictor = Predictor.sla(0.5)
    blocks = predict_blocks(*arrays[:2], predictor, kv_lens=LENS)
    assert numpy.array_equal(blocks, predict_blocks(q, k, predictor, kv_lens=LENS).numpy())
    out = sparse_attention(*arrays, predictor, kv_lens=LENS)
    assert numpy.array_equal(out, sparse_attention(q, k, v, predictor, kv_lens=LENS).numpy())
    with pytest.raises(TypeError, match="kv_lens: type is Tensor, expected an array of numpy, as q"):
        sageattn(*arrays, kv_lens=torch.tensor(LENS))
    with pytest.raises(ValueError, match=r"kv_lens: shape is \[2\], expected \[4\], one for each batch entry"):
        sageattn(*arrays, kv_lens=[1, 2])
    with pytest.raises(ValueError, match=r"kv_lens\[1\]: value is 151, expected 0 to 150, k's length"):
        sageattn(*arrays, kv_lens=numpy.array([1, 151, 3, 4]))


def test_jax():
    jax = pytest.importorskip("jax")
    q, k, v = padded("cpu")
    wanted = sageattn(q, k, v, kv_lens=LENS).numpy()
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = [jax.numpy.asarray(x.numpy()) for x in (q, k, v)]
        for kv_lens in (LENS, numpy.array(LENS), jax.numpy.asarray(LENS, dtype="int32")):
            assert numpy.array_equal(numpy.asarray(sageattn(*arrays, kv_lens=kv_lens)), wanted)
        with pytest.raises(TypeError, match="kv_lens: dtype is float32, expected int32"):
            sageattn(*arrays, kv_lens=jax.numpy.ones(4))
        with pytest.raises(ValueError, match=r"kv_lens: shape is \[4, 1\], expected \[batch\]"):
            sageattn(*arrays, kv_lens=jax.numpy.ones((4, 1), dtype="int32"))


def test_a_compiled_graph_has_them(device):
    q, k, v = padded(device)
    predictor = Predictor.sla(0.5)
    lens = torch.tensor(LENS, device=device)

    def attend(q, k, v, kv_lens):
        dense = sageattn(q, k, v, is_causal=True, kv_lens=kv_lens, return_lse=True)[0]
        return dense + sparse_attention(q, k, v, predictor, kv_lens=kv_lens)

    for kv_lens in (lens, lens.int(), LENS, numpy.array(LENS)):
        torch._dynamo.reset()
        assert torch._dynamo.explain(attend)(q, k, v, kv_lens).graph_break_count == 0
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v, kv_lens), attend(q, k, v, kv_lens))
    # Other lengths are no other graph.
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    compiled(q, k, v, lens)
    with torch.compiler.set_stance("fail_on_recompile"):
        fewer = (lens - 10).clamp(min=0)
        assert torch.equal(compiled(q, k, v, fewer), attend(q, k, v, fewer))


def test_vmap_and_the_meta_device(device):
    q, k, v = padded(device)
    lens = torch.tensor(LENS, device=device)
    one = partial(sageattn, is_causal=True, scheme="full")
    found = torch.func.vmap(lambda q, k, v, n: one(q, k, v, kv_lens=n))(
        q[:, None], k[:, None], v[:, None], lens[:, None]
    )
    assert_same(found[:, 0], one(q, k, v, kv_lens=lens))
    x = torch.empty(2, 4, 10, 64, device="meta", dtype=torch.float16)
    assert sageattn(x, x, x, kv_lens=[1, 2]).shape == x.shape


WRONG = [
    (ValueError, r"kv_lens: shape is \[2\], expected \[4\], one for each batch entry", [1, 2]),
    (ValueError, r"kv_lens\[1\]: value is 151, expected 0 to 150, k's length", [1, 151, 3, 4]),
    (ValueError, r"kv_lens\[0\]: value is -1, expected 0 to 150, k's length", numpy.array([-1, 1, 3, 4])),
    (ValueError, r"kv_lens\[3\]: value is 151, expected 0 to 150, k's length", torch.tensor([1, 2, 3, 151])),
    (TypeError, r"kv_lens\[1\]: value is True, of type bool, expected an integer", [1, True, 3, 4]),
    (TypeError, r"kv_lens\[0\]: value is 1.5, of type float, expected an integer", numpy.array([1.5, 1, 3, 4])),
    (TypeError, "kv_lens: type is int, expected a list of integers, an array of numpy or a tensor as q", 7),
    (TypeError, "kv_lens: type is str, expected a list of integers", "1234"),
]


@pytest.mark.parametrize(("error", "message", "kv_lens"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_wrong_is_named(device, error, message, kv_lens):
    q, k, v = padded(device)
    with pytest.raises(error, match=message):
        sageattn(q, k, v, kv_lens=kv_lens)
    with pytest.raises(error, match=message):
        sparse_attention(q, k, v, Predictor.sla(0.5), kv_lens=kv_lens)


def test_what_is_wrong_with_a_tensor_is_named(device):
    q, k, v = padded(device)
    lens = torch.tensor(LENS, device=device)
    with pytest.raises(TypeError, match="kv_lens: dtype is float32, expected int32 or int64"):
        sageattn(q, k, v, kv_lens=lens.float())
    with pytest.raises(TypeError, match="kv_lens: dtype is int16, expected int32 or int64"):
        predict_blocks(q, k, Predictor.sla(0.5), kv_lens=lens.short())
    with pytest.raises(ValueError, match=r"kv_lens: shape is \[4, 1\], expected \[batch\]"):
        sageattn(q, k, v, kv_lens=lens[:, None])
    with pytest.raises(ValueError, match=r"kv_lens: shape is \[3\], expected \[4\], one for each batch entry"):
        sageattn(q, k, v, kv_lens=lens[:3])
    with pytest.raises(ValueError, match="kv_lens: device is meta, expected (cpu|cuda:0), as q"):
        sageattn(q, k, v, kv_lens=lens.to("meta"))
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="k: requires_grad is True, expected False"):
        sageattn(q, k.clone().requires_grad_(), v, kv_lens=lens)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"kv_lens\[1\]: value is 4294967306, expected at most 2147483647: int32"):
            sageattn(q, k, v, kv_lens=torch.tensor([1, 2**32 + 10, 3, 4]))


def test_packed_sequences_have_boundaries_instead():
    x = random(10, 2, 64, seed=0)
    for name in ("kv_lens", "seqused_k", "cache_seqlens"):
        with pytest.raises(NotImplementedError, match=f"{name}: .*; cu_seqlens_k has the lengths of packed keys"):
            sageattention.sageattn_varlen(x, x, x, [0, 10], [0, 10], 10, 10, **{name: [10]})
    with pytest.raises(ValueError, match="kv_lens: value is True, expected False, as cu_seqlens_k has the lengths"):
        sageattention.warm_up([(10, 2, 64)], cu_seqlens_q=[0, 10], kv_lens=True)


def test_lengths_of_a_gpu_are_cut_off_there(cuda):
    q, k, v = (x.nan_to_num() for x in padded(cuda))
    found = sageattn(q, k, v, kv_lens=torch.tensor([1000, 37, -5, 2**40], device=cuda), return_lse=True)
    check(found, q, k, v, lens=[150, 37, 0, 150])


def test_nothing_waits_for_a_gpu(cuda):
    q, k, v = padded(cuda)
    lens = torch.tensor(LENS, device=cuda, dtype=torch.int32)
    call = lambda: sageattn(q, k, v, is_causal=True, kv_lens=lens)
    sageattention.warm_up([(q.shape, k.shape)], "float16", is_causal=True, kv_lens=True)
    wanted = call()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)
    out = call()
    done.record()
    assert not done.query(), "the call has waited"
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


def test_a_graph_is_replayed_with_other_lengths(cuda):
    q, k, v = padded(cuda, 1, lens=[150] * 4)
    lens = torch.tensor(LENS, device=cuda, dtype=torch.int32)
    call = lambda: sageattn(q, k, v, is_causal=True, kv_lens=lens)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for shift in range(3):
        lens.copy_(torch.tensor(LENS).roll(shift))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, call()), f"replay {shift}"


def test_decoding_from_a_contiguous_cache(device):
    """Tensors for the most tokens, into which the caller writes: prompts of their own lengths, and then token by token."""
    prompts, steps, room = [70, 33, 1], 6, 100
    dtype, generator = dtype_of(device), torch.Generator().manual_seed(3)

    def tokens(heads, count):
        return torch.randn(len(prompts), heads, count, 64, generator=generator).to(device=device, dtype=dtype)

    # What nobody has written yet may be anything.
    keys, values = (torch.full((len(prompts), 2, room, 64), float("nan"), device=device, dtype=dtype) for _ in range(2))
    appended = [[], []]
    for b, length in enumerate(prompts):
        for cache, own in zip((keys, values), appended):
            prompt = tokens(2, length)[b]
            cache[b, :, :length] = prompt
            own.append(prompt)
    kv_lens = torch.tensor(prompts, device=device, dtype=torch.int32)
    rows = torch.arange(len(prompts), device=device)
    for _ in range(steps):
        q, k, v = tokens(6, 1), tokens(2, 1), tokens(2, 1)
        keys[rows, :, kv_lens.long()] = k[:, :, 0]
        values[rows, :, kv_lens.long()] = v[:, :, 0]
        kv_lens += 1
        out, lse = sageattn(q, keys, values, is_causal=True, kv_lens=kv_lens, return_lse=True)
        for b in range(len(prompts)):
            for own, new in zip(appended, (k, v)):
                own[b] = torch.cat([own[b], new[b]], 1)
            wanted, wanted_lse = attention(q[b : b + 1], appended[0][b][None], appended[1][b][None])
            assert_close(out[b : b + 1], wanted, TOLERANCE["fp16"], f"sequence {b}")
            assert_lse_close(lse[b : b + 1], wanted_lse, f"sequence {b}")
    assert kv_lens.tolist() == [length + steps for length in prompts]
