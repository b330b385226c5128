"""The quantised KV cache, beside exact attention over everything that was appended."""

import numpy
import pytest
import sageattention
import torch
from exact import attention, random, relative_l1
from sageattention import KvCache

# Keys in INT8, and values in up to 8 bits of integers: measured worst 0.0124; values in E4M3: 0.0270. Doubled.
CACHED, CACHED_FP8 = 0.025, 0.054


def tokens(count, *, seed, device, heads=2, batch=2, head_dim=64):
    dtype = torch.float16 if device == "cuda" else torch.float32
    k = random(batch, heads, count, head_dim, seed=seed, bias=2.0, dtype=dtype, device=device)
    return k, random(batch, heads, count, head_dim, seed=seed + 1, dtype=dtype, device=device)


def queries(count, *, seed, device, heads=6, batch=2, head_dim=64):
    dtype = torch.float16 if device == "cuda" else torch.float32
    return random(batch, heads, count, head_dim, seed=seed, dtype=dtype, device=device)


@pytest.mark.parametrize("values", ["fp16", "bf16", "int8", "fp8"])
def test_a_prompt_and_the_tokens_after_it(device, values):
    cache = KvCache(2, 64, sequences=2, values=values, max_tokens=300)
    chunks = [tokens(count, seed=10 * i, device=device) for i, count in enumerate((200, 1, 1, 7))]
    seen = [[], []]
    for i, (k, v) in enumerate(chunks):
        if device == "cuda" and values == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            with pytest.raises(NotImplementedError, match="fp8"):
                cache.append(k, v)
            return
        cache.append(k, v)
        for all_of, chunk in zip(seen, (k, v)):
            all_of.append(chunk)
        q = queries(k.shape[2], seed=100 + i, device=device)
        out, lse = cache.attend(q, return_lse=True)
        keys, vals = (torch.cat(all_of, 2) for all_of in seen)
        wanted, wanted_lse = attention(q, keys, vals, causal="bottom_right")
        error = relative_l1(out, wanted)
        print(f"{values}: relative L1 {error:.5f}")
        assert error < (CACHED_FP8 if values == "fp8" else CACHED)
        assert (lse - wanted_lse).abs().max() < 0.05
        assert out.shape == q.shape and out.dtype == q.dtype
    assert cache.lengths == [209, 209] and cache.nbytes > 0


def test_sequences_have_lengths_of_their_own(device):
    cache = KvCache(2, 64, sequences=3, max_tokens=100)
    (k0, v0), (k1, v1) = tokens(40, seed=1, device=device, batch=1), tokens(25, seed=3, device=device, batch=1)
    cache.append(k0, v0, sequences=[2])
    cache.append(k1, v1, sequences=[0])
    assert cache.lengths == [25, 0, 40]
    q = queries(1, seed=5, device=device, batch=3)
    out = cache.attend(q)
    assert relative_l1(out[:1], attention(q[:1], k1, v1)[0]) < CACHED
    assert (out[1] == 0).all()
    assert relative_l1(out[2:], attention(q[2:], k0, v0)[0]) < CACHED
    # In another order, and one twice.
    again = cache.attend(q, sequences=[2, 0, 2])
    assert relative_l1(again[1:2], attention(q[1:2], k1, v1)[0]) < CACHED
    cache.truncate(10, sequences=[2])
    out = cache.attend(q[:1], sequences=[2])
    assert relative_l1(out, attention(q[:1], k0[:, :, :10], v0[:, :, :10])[0]) < CACHED
    cache.reset()
    assert cache.lengths == [0, 0, 0] and (cache.attend(q) == 0).all()


def test_windows_caps_and_sinks(device):
    cache = KvCache(2, 64, sequences=2, max_tokens=300)
    k, v = tokens(150, seed=1, device=device)
    cache.append(k, v)
    q = queries(5, seed=3, device=device)
    out = cache.attend(q, window=(30, 0), logit_softcap=5.0)
    assert relative_l1(out, attention(q, k, v, causal="bottom_right", window=(30, 0), softcap=5.0)[0]) < CACHED
    sinks = torch.tensor([-2.0, 0.0, 2.0, 4.0, 6.0, float("-inf")], device=device)
    out, lse = cache.attend(q, sinks=sinks, return_lse=True)
    wanted, wanted_lse = attention(q, k, v, causal="bottom_right")
    with_sink = torch.logaddexp(wanted_lse, sinks.double()[None, :, None])
    assert relative_l1(out, wanted * (wanted_lse - with_sink).exp()[..., None]) < CACHED
    assert (lse - with_sink).abs().max() < 0.05


def test_sequences_that_share_a_prefix():
    cache = KvCache(2, 64, sequences=2)
    k, v = tokens(50, seed=1, device="cpu", batch=1)
    cache.append(k, v, sequences=[0])
    cache.fork(0, 1)
    more_k, more_v = tokens(3, seed=3, device="cpu")
    cache.append(more_k, more_v)
    q = queries(1, seed=5, device="cpu")
    keys, vals = (torch.cat([x.expand(2, -1, -1, -1), more], 2) for x, more in ((k, more_k), (v, more_v)))
    assert relative_l1(cache.attend(q), attention(q, keys, vals)[0]) < CACHED
    with pytest.raises(ValueError, match="to: value is sequence 1 with 53 tokens, expected an empty sequence"):
        cache.fork(0, 1)


def test_numpy_arrays_and_the_other_layout():
    k, v = tokens(70, seed=1, device="cpu", batch=1)
    q = queries(1, seed=3, device="cpu", batch=1)
    cache = KvCache(2, 64, tensor_layout="NHD", values="int8")
    numbers = [numpy.ascontiguousarray(x.transpose(1, 2).numpy()) for x in (q, k, v)]
    cache.append(*numbers[1:])
    out = cache.attend(numbers[0])
    assert isinstance(out, numpy.ndarray)
    assert relative_l1(torch.from_numpy(out).transpose(1, 2), attention(q, k, v)[0]) < CACHED


def test_masks_over_a_cache_are_the_processors():
    cache = KvCache(2, 64, sequences=2)
    k, v = tokens(60, seed=1, device="cpu")
    cache.append(k, v)
    q = queries(4, seed=3, device="cpu")
    mask = torch.rand(2, 1, 4, 60, generator=torch.Generator().manual_seed(1)) < 0.7
    out = cache.attend(q, is_causal=False, attn_mask=mask)
    assert relative_l1(out, attention(q, k, v, mask=mask)[0]) < CACHED


def test_on_a_gpu_what_it_lacks_is_named(cuda):
    k, v = tokens(20, seed=1, device=cuda)
    with pytest.raises(
        ValueError, match="max_pages: value is none, expected a number: the pool of a GPU has a fixed size"
    ):
        KvCache(2, 64, sequences=2).append(k, v)
    cache = KvCache(2, 64, sequences=2, max_tokens=100)
    cache.append(k, v)
    with pytest.raises(NotImplementedError, match="mask over a KV cache on a GPU"):
        cache.attend(queries(1, seed=3, device=cuda), attn_mask=torch.ones(20, dtype=torch.bool, device=cuda))
    with pytest.raises(NotImplementedError, match="fork of a KV cache on cuda:0"):
        cache.fork(0, 1)
    with pytest.raises(ValueError, match="device: value is cpu, expected cuda:0, where the cache is"):
        cache.append(*tokens(1, seed=3, device="cpu"))
    with (
        torch.cuda.stream(torch.cuda.Stream()),
        pytest.raises(ValueError, match="stream: value is another of the GPU's"),
    ):
        cache.append(k, v)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="keys: value is fp8, expected int8"):
        KvCache(2, 64, keys="fp8")
    with pytest.raises(ValueError, match="values: value is int3, expected fp16, bf16, int8 or fp8"):
        KvCache(2, 64, values="int3")
    with pytest.raises(ValueError, match="head_dim: value is 300, expected 1 to 256 in a KV cache"):
        KvCache(2, 300)
    with pytest.raises(ValueError, match="page_size: value is 48, expected a power of two"):
        KvCache(2, 64, page_size=48)
    with pytest.raises(ValueError, match="max_pages: value is 5, expected None, as max_tokens is given"):
        KvCache(2, 64, max_tokens=50, max_pages=5)
    with pytest.raises(TypeError, match="sequences: value is 1.5, of type float, expected an integer"):
        KvCache(2, 64, sequences=1.5)
    cache = KvCache(2, 64, sequences=2, max_tokens=64)
    k, v = tokens(10, seed=1, device="cpu")
    with pytest.raises(ValueError, match=r"k: shape is \[1, 2, 10, 64\], expected .* with batch = 2, as the cache"):
        cache.append(k[:1], v[:1])
    with pytest.raises(TypeError, match="v: dtype is f16, expected f32, as k"):
        cache.append(k, v.half())
    with pytest.raises(ValueError, match="sequences: value is .0, 0., expected each sequence once"):
        cache.append(k, v, sequences=[0, 0])
    with pytest.raises(ValueError, match="max_pages: value is 2, expected 4 for 100 more tokens"):
        cache.append(*tokens(100, seed=1, device="cpu"))
    assert cache.lengths == [0, 0]
    cache.append(k, v)
    with pytest.raises(ValueError, match=r"q: shape is \[2, 6, 64\], expected \[batch, heads, seq, head_dim\]"):
        cache.attend(torch.zeros(2, 6, 64))
    with pytest.raises(ValueError, match="a multiple of 2 heads, as the cache"):
        cache.attend(torch.zeros(2, 3, 1, 64))
    with pytest.raises(ValueError, match="sequence: value is 7, expected below 2"):
        cache.attend(torch.zeros(1, 4, 1, 64), sequences=[7])
    with pytest.raises(ValueError, match="len: value is 20, expected at most the 10 tokens of the sequence"):
        cache.truncate(20)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="q: requires_grad is True"):
        cache.attend(torch.zeros(2, 4, 1, 64, requires_grad=True))
    assert "KvCache(lengths=[10, 10]" in repr(cache) and sageattention.KvCache is KvCache
