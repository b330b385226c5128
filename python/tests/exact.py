"""Attention in float64, and random tensors."""

import math

import torch


def random(*shape, seed, dtype=torch.float32, device="cpu", bias=0.0):
    """N(0, 1), each channel shifted by `bias` times an N(0, 1) of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) + bias * torch.randn(shape[-1], generator=generator)
    return x.to(device=device, dtype=dtype)


def qkv(batch, heads, kv_heads, q_len, kv_len, head_dim, *, layout="HND", dtype=torch.float32, device="cpu", seed=0):
    def one(offset, heads, length):
        shape = (batch, heads, length, head_dim) if layout == "HND" else (batch, length, heads, head_dim)
        # K with a bias, as the keys of trained models have: smoothing matters.
        return random(*shape, seed=3 * seed + offset, dtype=dtype, device=device, bias=2.0 if offset == 1 else 0.0)

    return one(0, heads, q_len), one(1, kv_heads, kv_len), one(2, kv_heads, kv_len)


def local(
    batch,
    heads,
    kv_heads,
    q_len,
    kv_len,
    head_dim,
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    layout="HND",
    sharp=2.0,
):
    """q, k and v as of a video: tokens near each other are alike, so that attention is local, the more so the larger
    `sharp` is; heads differ in noise."""

    def one(offset, heads, length):
        generator = torch.Generator().manual_seed(3 * seed + offset)
        frequencies = torch.linspace(0.004, 0.025, head_dim // 2)
        angles = torch.arange(length)[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        noise = torch.linspace(0.1, 0.5, heads)[:, None, None]
        x = sharp * waves + noise * torch.randn(batch, heads, length, head_dim, generator=generator)
        if layout == "NHD":
            x = x.transpose(1, 2)
        return x.contiguous().to(device=device, dtype=dtype)

    return (
        one(0, heads, q_len),
        one(1, kv_heads, kv_len),
        random(*one(2, kv_heads, kv_len).shape, seed=3 * seed + 2, dtype=dtype, device=device),
    )


def visible(block_map, block_q, block_k, q_len, kv_len):
    """A map of blocks as a mask of scores."""
    return block_map.bool().repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)[:, :, :q_len, :kv_len]


def attention(q, k, v, *, layout="HND", causal=None, scale=None, mask=None, softcap=None, window=(None, None)):
    """Output and log-sum-exp in float64. `causal` is None, "bottom_right" or "top_left"."""
    if layout == "NHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    keys = torch.arange(k.shape[2], device=q.device)[None, :]
    diagonal = rows + (k.shape[2] - q.shape[2] if causal != "top_left" else 0)
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if causal is not None:
        visible &= keys <= diagonal
    if window[0] is not None:
        visible &= keys >= diagonal - window[0]
    if window[1] is not None:
        visible &= keys <= diagonal + window[1]
    scores = scores.masked_fill(~visible, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees no key is zeros. (The exponential of scores minus `lse` is not the same where a row's biases are so low
    # that the logarithm of the number of keys is lost beside them.)
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1), nan=0.0)
    out = weights @ v
    return (out.transpose(1, 2) if layout == "NHD" else out), lse


def relative_l1(found, wanted):
    return ((found.double() - wanted).abs().sum() / wanted.abs().sum()).item()


def assert_close(found, wanted, tolerance, label=""):
    assert found.shape == wanted.shape, label
    assert torch.isfinite(found).all(), f"{label}: not finite"
    error = relative_l1(found, wanted)
    assert error <= tolerance, f"{label}: relative L1 is {error}, at most {tolerance} wanted"


def assert_same(found, wanted):
    """The same bits on the CPU. On a GPU, options may be other kernels, and other maps another order of work."""
    if found.is_cuda:
        torch.testing.assert_close(found, wanted, rtol=4e-3, atol=4e-3)
    else:
        assert torch.equal(found, wanted)


def assert_lse_close(found, wanted, label=""):
    """The mean error of a score is below 0.02 on these inputs (INT8 of Q and K); the largest of many rows is not 0.15."""
    assert found.dtype == torch.float32 and found.shape == wanted.shape, label
    hidden = torch.isneginf(wanted)
    assert torch.equal(torch.isneginf(found), hidden), label
    errors = (found.double() - wanted)[~hidden].abs()
    assert errors.numel() == 0 or errors.max() < 0.15, f"{label}: {errors.max()}"


# Relative L1 on N(0, 1) with biased K, by what P·V is computed in: INT8 of Q and K costs 0.011 to 0.014, FP8 of P and V
# 0.037 (docs/performance/hopper.md#accuracy-on-the-gpu, README); twice that.
TOLERANCE = {"fp16": 0.028, "fp8": 0.075}


def int8_scheme(device):
    """A scheme that quantises however few keys there are; left open, a device computes few in full precision."""
    return "sage2-int8-fp16-per-warp" if device == "cuda" else "int8"
