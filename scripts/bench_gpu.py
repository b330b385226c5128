"""Attention on a GPU beside its peers, in one run: our binary, PyTorch's FlashAttention-2 and cuDNN, FlashAttention-3, and
SageAttention1.

    python3 scripts/bench_gpu.py PATH_OF_bench_gpu [--rounds 3] [--shapes NAME] [--lengths 4096,8192]

Prints, for each shape, TFLOP/s end to end, quantisation included, and of our attention kernels alone; ratios to the peers
with the spread over the rounds; and for each preparing kernel the share of the memory bandwidth's floor. Peers that are
not installed are named and left out. Needs torch; takes `sageattention==1.0.6` (Triton) and `fa3-fwd==0.0.3` where they
can be imported. FP8 peers are timed on inputs that are FP8 already: kernels alone.
"""

import argparse
import json
import statistics
import subprocess

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# (head_dim, causal, batch, heads, key heads, length)
GRID = [(128, causal, 4, 32, 32, n) for causal in (False, True) for n in (1024, 2048, 4096, 8192, 16384)]
MODELS = [
    (128, False, 1, 24, 24, 17776),  # video
    (64, False, 2, 16, 16, 4250),  # image
    (128, True, 1, 32, 8, 8192),  # prefill of a language model
    (64, False, 4, 32, 32, 4096),
    (64, False, 4, 32, 32, 16384),
]
SHAPES = {"all": GRID + MODELS, "grid": GRID, "models": MODELS}
FP8 = "sage2-int8-fp8-f32-per-warp"
SCHEMES = ["auto", FP8, "sage2-int8-fp8-per-thread", "full"]
# Bytes a second that a large copy reaches on an H100 (docs/performance.md): the floor of kernels that only move bytes.
BANDWIDTH = 3.0e12


def median_ms(run, warm_up=3, runs=15):
    times = []
    for i in range(warm_up + runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= warm_up:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def sdpa(backend):
    def attention(q, k, v, causal):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return attention


def peers():
    """Each peer's name, what makes its inputs of bf16 `[batch, heads, length, head_dim]`, and its call."""
    heads_first = lambda *tensors: tensors
    found = {
        "FA2": (heads_first, sdpa(SDPBackend.FLASH_ATTENTION)),
        "cuDNN": (heads_first, sdpa(SDPBackend.CUDNN_ATTENTION)),
    }
    try:
        from fa3_fwd_interface import flash_attn_func

        heads_last = lambda *tensors: [x.transpose(1, 2).contiguous() for x in tensors]
        fp8 = lambda *tensors: [x.to(torch.float8_e4m3fn) for x in heads_last(*tensors)]
        found["FA3"] = (heads_last, lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal))
        found["FA3-fp8"] = (fp8, found["FA3"][1])
    except Exception as error:
        print(f"FA3 left out: {error}")
    try:
        from sageattention import sageattn

        half = lambda *tensors: [x.half() for x in tensors]
        found["Sage1"] = (half, lambda q, k, v, causal: sageattn(q, k, v, is_causal=causal))
    except Exception as error:
        print(f"Sage1 left out: {error}")
    return found


def time_peers(found, shape, report):
    head_dim, causal, batch, heads, kv_heads, length = shape
    random = lambda h: torch.randn(batch, h, length, head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = random(heads), random(kv_heads), random(kv_heads)
    times = {}
    for name, (prepare, call) in found.items():
        try:
            inputs = prepare(q, k, v)
            times[name] = median_ms(lambda: call(*inputs, causal))
        except Exception as error:
            if report:
                print(f"{name} left out: {str(error).splitlines()[0]}")
    return times


def ours(binary, schemes, shape):
    head_dim, causal, batch, heads, kv_heads, length = shape
    arguments = [binary, ",".join(schemes), head_dim, str(causal).lower(), batch, f"{heads}/{kv_heads}", length]
    result = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{arguments}: {result.stderr}")
    return [json.loads(line) for line in result.stdout.splitlines()]


def name_of(shape):
    head_dim, causal, batch, heads, kv_heads, length = shape
    grouped = "" if heads == kv_heads else f"/{kv_heads}"
    return f"B{batch} H{heads}{grouped} S{length} D{head_dim}{' causal' if causal else ''}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", choices=SHAPES, default="all")
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--lengths", default="", help="only these of the lengths")
    options = parser.parse_args()
    schemes = options.schemes.split(",")
    found = peers()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "TFLOP/s; ours f16 end to end, peers bf16")
    columns = [*schemes, *(f"{s} kernel" for s in schemes if s != "full"), *found]
    short = lambda column: column.replace("sage2-int8-fp8-f32-per-warp", "fp8").replace(
        "sage2-int8-fp8-per-thread", "fp8x2")
    print(f"{'shape':<27}" + "".join(f"{short(c):>13}" for c in columns) + "   auto / best 16-bit (spread)  / Sage1")
    lengths = [int(n) for n in options.lengths.split(",") if n]
    preparing = {}
    for index, shape in enumerate(SHAPES[options.shapes]):
        head_dim, causal, batch, heads, kv_heads, length = shape
        if lengths and length not in lengths:
            continue
        flops = 4 * batch * heads * head_dim * length**2 / (2 if causal else 1)
        rounds = []
        for _ in range(options.rounds):
            times = {}
            for row in ours(options.binary, schemes, shape):
                times[row["scheme"]] = row["ms"]
                for kernel in row["kernels"]:
                    name, ms = kernel["kernel"], kernel["ms"]
                    if name.startswith("attention"):
                        times[f"{row['scheme']} kernel"] = ms
                    elif name.startswith("quantize") and not causal:
                        # 16-bit elements read once, 8-bit elements written once.
                        floor = 3 * batch * kv_heads * length * head_dim / BANDWIDTH * 1e3
                        preparing.setdefault((name.split("_d")[0], head_dim, length), []).append(floor / ms)
            times |= time_peers(found, shape, index == 0)
            torch.cuda.empty_cache()
            rounds.append(times)
        best = {c: statistics.median(r[c] for r in rounds) for c in columns if all(c in r for r in rounds)}
        cells = "".join(f"{flops / best[c] / 1e9:>13.0f}" if c in best else f"{'-':>13}" for c in columns)
        exact = [c for c in ("FA2", "cuDNN", "FA3") if c in best]
        against = lambda r: min(r[c] for c in exact) / r["auto"] if exact and "auto" in r else float("nan")
        spread = [against(r) for r in rounds]
        sage1 = f"{best['Sage1'] / best['auto']:.2f}" if "Sage1" in best and "auto" in best else "-"
        ratio = f"{against(best):.2f} ({min(spread):.2f}-{max(spread):.2f})"
        print(f"{name_of(shape):<27}{cells}   {ratio:>27}   {sage1:>5}", flush=True)
    print("\npreparing kernels, share of the floor (bytes read and written once at 3.0 TB/s)")
    for (kernel, head_dim, length), shares in sorted(preparing.items()):
        print(f"  {kernel:<44} D{head_dim} S{length:<6} {statistics.median(shares):.0%}")


if __name__ == "__main__":
    main()
