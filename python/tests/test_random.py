"""Random calls against attention in float64: shapes, strides, masks, windows, caps, dtypes, functions, layouts, groups.

Seeds are fixed. `SAGE_RANDOM_CALLS=5000` runs more calls than the thousand of every day; a failure prints the call's
seed, and `SAGE_RANDOM_SEED=n` runs that call alone.
"""

import os
import random as python_random

import pytest
import sageattention
import sageattn3
import torch
from exact import TOLERANCE, attention, random

ALONE = os.environ.get("SAGE_RANDOM_SEED")
CHUNKS = 16
# A GPU compiles kernels for every new kind of call, which takes longer than the calls.
CALLS = {"cpu": int(os.environ.get("SAGE_RANDOM_CALLS", 960)), "cuda": int(os.environ.get("SAGE_RANDOM_CALLS", 96))}

FUNCTIONS = [
    (sageattention.sageattn, {}, "fp16"),
    (sageattention.sageattn_qk_int8_pv_fp16_triton, {}, "fp16"),
    (sageattention.sageattn_qk_int8_pv_fp16_triton, {"quantization_backend": "cuda"}, "fp16"),
    (sageattention.sageattn_qk_int8_pv_fp16_cuda, {}, "fp16"),
    (sageattention.sageattn_qk_int8_pv_fp16_cuda, {"qk_quant_gran": "per_warp", "pv_accum_dtype": "fp16+fp32"}, "fp16"),
    (sageattention.sageattn_qk_int8_pv_fp8_cuda, {}, "fp8"),
    (sageattention.sageattn_qk_int8_pv_fp8_cuda, {"pv_accum_dtype": "fp32+fp32"}, "fp8"),
    (sageattention.sageattn_qk_int8_pv_fp8_cuda_sm90, {}, "fp8"),
    (sageattn3.sageattn3_blackwell, {}, "fp16"),
]
# By name: what the automatic choice does not come to at these sizes.
SCHEMES = {
    "cpu": ["full", "int8", "int8-per-token", "int8-per-token-rotated", "int8-f32"],
    "cuda": ["full", "sage1-int8-fp16", "sage2-int8-fp16-per-warp", "int8-fp8", "sage2-int8-fp8-per-thread"],
}
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 200, 257]
HEAD_DIMS = [1, 8, 20, 32, 40, 64, 64, 64, 72, 80, 96, 128, 128, 160, 256]


def seen_otherwise(choose, x):
    """The same numbers, lying otherwise in memory."""
    kind = choose.choice(["as it is", "as it is", "dimensions swapped", "gaps", "channels apart"])
    if kind == "dimensions swapped":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if kind == "gaps":
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    if kind == "channels apart":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def a_mask(choose, seed, batch, heads, q_len, kv_len, dtype, device):
    kind = choose.choice(["none", "none", "none", "bool", "additive"])
    if kind == "none":
        return None
    shape = [choose.choice([size, size, 1]) for size in (batch, heads, q_len, kv_len)][choose.choice([0, 0, 1, 2]) :]
    mask = random(*shape, seed=seed, device=device)
    return mask > -0.7 if kind == "bool" else mask.to(choose.choice([dtype, torch.float32]))


def band_and_softcap(choose, options, exact, chances):
    """Gives `options` of a call, and `exact` of its reference, a causal mask, a window and a cap, by those chances."""
    causal, window, softcap = chances
    if choose.random() < causal:
        exact["causal"] = choose.choice(["bottom_right", "bottom_right", "top_left"])
        options.update(is_causal=True, causal_alignment=exact["causal"])
    if choose.random() < window:
        options["window"] = tuple(choose.choice([-1, 0, 5, 50]) for _ in range(2))
        exact["window"] = tuple(None if limit < 0 else limit for limit in options["window"])
    if choose.random() < softcap:
        options["logit_softcap"] = exact["softcap"] = choose.choice([0.5, 5.0, 30.0])


def call(seed, device):
    """A random call: what it is in words, the result, and the exact one."""
    choose = python_random.Random(seed)
    dtype = choose.choice([torch.float16, torch.bfloat16] + ([torch.float32] if device == "cpu" else []))
    function, named, values = choose.choice(FUNCTIONS + FUNCTIONS[:1] * 3)
    if values == "fp8" and device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        function, named, values = FUNCTIONS[0]
    layout = choose.choice(["HND", "NHD"])
    batch, kv_heads, group = choose.choice([1, 1, 2, 3]), choose.choice([1, 2]), choose.choice([1, 1, 2, 3])
    q_len, kv_len, head_dim = choose.choice(LENGTHS), choose.choice(LENGTHS), choose.choice(HEAD_DIMS)
    heads = kv_heads * group

    def tensor(offset, heads, length, bias=0.0):
        shape = (batch, heads, length, head_dim) if layout == "HND" else (batch, length, heads, head_dim)
        return random(*shape, seed=4 * seed + offset, dtype=dtype, device=device, bias=bias)

    # As the keys of trained models have it, channels of K are off centre: smoothing matters.
    q, k, v = tensor(0, heads, q_len), tensor(1, kv_heads, kv_len, bias=1.0), tensor(2, kv_heads, kv_len)
    options = dict(named)
    exact = {"layout": layout, "window": (None, None)}
    mask = a_mask(choose, 4 * seed + 3, batch, heads, q_len, kv_len, dtype, device)
    if mask is not None:
        options["attn_mask"] = exact["mask"] = mask
    band_and_softcap(choose, options, exact, [0.3, 0.2, 0.15])
    if choose.random() < 0.3:
        options["sm_scale"] = exact["scale"] = choose.choice([0.02, 0.1, 0.5]) / head_dim**0.25
    if function is sageattention.sageattn and choose.random() < 0.5:
        options["scheme"] = choose.choice(SCHEMES[device])
        if "fp8" in options["scheme"]:
            values = "fp8"
            if torch.cuda.get_device_capability() < (8, 9):
                options["scheme"] = "full"
    tensors = [seen_otherwise(choose, x) for x in (q, k, v)]
    shown = {name: list(x.shape) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    words = f"{function.__name__} {layout} {dtype} {list(q.shape)} x {list(k.shape)} {shown}"
    found = function(*tensors, tensor_layout=layout, return_lse=True, **options)
    yield words, found, attention(q, k, v, **exact), values


def packed_call(seed, device):
    """As `call`, of packed sequences: each by itself, as a call of one batch entry."""
    choose = python_random.Random(seed)
    dtype = choose.choice([torch.float16, torch.bfloat16] + ([torch.float32] if device == "cpu" else []))
    kv_heads, group, head_dim = choose.choice([1, 2]), choose.choice([1, 2, 3]), choose.choice(HEAD_DIMS)
    lengths = [(choose.choice(LENGTHS), choose.choice(LENGTHS)) for _ in range(choose.choice([1, 2, 4]))]
    # [0, first end, second end, ...]
    cu_q, cu_k = ([sum(pair[side] for pair in lengths[:n]) for n in range(len(lengths) + 1)] for side in (0, 1))
    q, k, v = (
        random(rows, heads, head_dim, seed=4 * seed + n, dtype=dtype, device=device, bias=1.0 if n == 1 else 0.0)
        for n, (rows, heads) in enumerate([(cu_q[-1], kv_heads * group), (cu_k[-1], kv_heads), (cu_k[-1], kv_heads)])
    )
    options, exact = {}, {"window": (None, None)}
    band_and_softcap(choose, options, exact, [0.4, 0.3, 0.2])
    longest = [choose.choice([None, max(pair[side] for pair in lengths)]) for side in (0, 1)]
    tensors = [seen_otherwise(choose, x) for x in (q, k, v)]
    out, lse = sageattention.sageattn_varlen(*tensors, cu_q, cu_k, *longest, return_lse=True, **options)
    words = f"sageattn_varlen {dtype} {lengths} of {kv_heads} x {group} heads, head_dim {head_dim} {options}"
    for b in range(len(lengths)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        wanted = attention(q[None, rows], k[None, keys], v[None, keys], layout="NHD", **exact)
        yield f"{words}, sequence {b}", (out[None, rows], lse[None, :, rows]), wanted, "fp16"


def patched_call(seed, device):
    """As `call`, of torch's function with its own arguments; log-sum-exps are not its to give."""
    choose = python_random.Random(seed)
    dtype = choose.choice([torch.float16, torch.bfloat16] + ([torch.float32] if device == "cpu" else []))
    batch, kv_heads, group = choose.choice([1, 2]), choose.choice([1, 2]), choose.choice([1, 1, 3])
    # No length of 0: torch computes those.
    q_len, kv_len, head_dim = choose.choice(LENGTHS[1:]), choose.choice(LENGTHS[1:]), choose.choice(HEAD_DIMS)
    q, k, v = (
        random(batch, heads, rows, head_dim, seed=4 * seed + n, dtype=dtype, device=device, bias=1.0 if n == 1 else 0.0)
        for n, (heads, rows) in enumerate([(kv_heads * group, q_len), (kv_heads, kv_len), (kv_heads, kv_len)])
    )
    options, exact = {"enable_gqa": group > 1}, {}
    mask = a_mask(choose, 4 * seed + 3, batch, kv_heads * group, q_len, kv_len, dtype, device)
    if mask is not None and mask.ndim >= 2:
        options["attn_mask"] = exact["mask"] = mask
    elif choose.random() < 0.4:
        options["is_causal"], exact["causal"] = True, "top_left"
    if choose.random() < 0.3:
        options["scale"] = exact["scale"] = choose.choice([0.02, 0.1, 0.5]) / head_dim**0.25
    tensors = [seen_otherwise(choose, x) for x in (q, k, v)]
    before = sageattention.counts().accelerated
    with sageattention.patched():
        out = torch.nn.functional.scaled_dot_product_attention(*tensors, **options)
    words = f"patch {dtype} {list(q.shape)} x {list(k.shape)} {list(options)}"
    assert sageattention.counts().accelerated == before + 1, words
    wanted, wanted_lse = attention(q, k, v, **exact)
    yield words, (out, wanted_lse.float()), (wanted, wanted_lse), "fp16"


def check(seed, device):
    kinds = [call, call, packed_call, patched_call]
    for words, found, wanted, values in kinds[seed // CHUNKS % len(kinds)](seed, device):
        compare(f"SAGE_RANDOM_SEED={seed}: {words}", *found, *wanted, values)


def compare(label, out, lse, wanted, wanted_lse, values):
    assert out.shape == wanted.shape and lse.shape == wanted_lse.shape, label
    assert torch.isfinite(out).all(), label
    # A row without a key is zeros, and its log-sum-exp is minus infinity: no keys at all included.
    hidden = torch.isneginf(wanted_lse)
    assert torch.equal(torch.isneginf(lse), hidden), label
    errors = (lse.double() - wanted_lse)[~hidden].abs()
    assert errors.numel() == 0 or errors.max() < 0.15, f"{label}: log-sum-exp differs by {errors.max()}"
    if wanted.numel() == 0 or not wanted.any():
        assert not out.any(), label
        return
    # V's size, where values that cancel leave an output near 0.
    size = wanted.abs().sum().clamp(min=0.05 * wanted.numel())
    error = ((out.double() - wanted).abs().sum() / size).item()
    # Of 6,000 calls on a CPU the largest error was 0.78 of this, of a single query.
    tolerance = TOLERANCE[values] + (2**-8 if out.dtype == torch.bfloat16 else 0)
    # That is of many outputs. The mean of a few scatters around it by the root of their number: of two outputs of one
    # channel, P and V as E4M3 have an error of 0.09 by their definition.
    tolerance *= 1 + wanted.numel() ** -0.5
    assert error <= tolerance, f"{label}: relative L1 is {error}, at most {tolerance} wanted"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random_calls(device, chunk):
    if ALONE is not None:
        seeds = [int(ALONE)] if chunk == 0 else []
    else:
        seeds = range(chunk, CALLS[device], CHUNKS)
    for seed in seeds:
        check(seed, device)
