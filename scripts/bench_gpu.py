"""Attention on a GPU beside its peers, in one run: our binary, PyTorch's FlashAttention-2 and cuDNN, and SageAttention1.

    python3 scripts/bench_gpu.py PATH_OF_bench_gpu [--rounds 2]

Prints, for each shape, TFLOP/s end to end and the ratios to the peers, and for each preparing kernel the share of the
memory bandwidth's floor. Peers that are not installed are named and left out. Needs torch; `sageattention==1.0.6`
(Triton) is taken where it can be imported.
"""

import argparse
import json
import statistics
import subprocess

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = [(128, False, n) for n in (1024, 2048, 4096, 8192, 16384)] + [
    (128, True, n) for n in (4096, 8192, 16384)
] + [(64, False, n) for n in (4096, 16384)]
BATCH, HEADS = 4, 32
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


def peers(head_dim, causal, length):
    q, k, v = (torch.randn(BATCH, HEADS, length, head_dim, device="cuda", dtype=torch.float16) for _ in range(3))
    times = {}
    for name, backend in (("FA2", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        try:
            with sdpa_kernel(backend):
                times[name] = median_ms(
                    lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
                )
        except RuntimeError as error:
            print(f"{name} left out: {str(error).splitlines()[0]}")
    try:
        from sageattention import sageattn

        times["Sage1"] = median_ms(lambda: sageattn(q, k, v, is_causal=causal))
    except Exception as error:
        if length == SHAPES[0][2]:
            print(f"Sage1 left out: {error}")
    return times


def ours(binary, scheme, head_dim, causal, length):
    arguments = [binary, scheme, head_dim, str(causal).lower(), BATCH, HEADS, length]
    result = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def floor_ms(kernel, head_dim, length):
    elements = BATCH * HEADS * length * head_dim
    # 16-bit elements read once, 8-bit elements written once.
    return 3 * elements / BANDWIDTH * 1e3 if kernel.startswith("quantize") else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--schemes", default="auto,full,sage2-int8-fp8-per-thread")
    parser.add_argument("--lengths", default="", help="only these of the lengths")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, f"B{BATCH} H{HEADS} f16, end to end")
    columns = [*options.schemes.split(","), "FA2", "cuDNN", "Sage1"]
    print(f"{'shape':<22}" + "".join(f"{c[:14]:>15}" for c in columns) + "   auto/FA2  auto/Sage1")
    preparing = {}
    lengths = [int(n) for n in options.lengths.split(",") if n]
    for head_dim, causal, length in SHAPES:
        if lengths and length not in lengths:
            continue
        flops = 4 * BATCH * HEADS * head_dim * length**2 / (2 if causal else 1)
        times = {}
        for _ in range(options.rounds):
            for scheme in options.schemes.split(","):
                row = ours(options.binary, scheme, head_dim, causal, length)
                times.setdefault(scheme, []).append(row["ms"])
                for kernel in row["kernels"]:
                    floor = floor_ms(kernel["kernel"], head_dim, length)
                    if floor and not causal:
                        key = (kernel["kernel"].split("_d")[0], head_dim, length)
                        preparing.setdefault(key, []).append(floor / kernel["ms"])
                    elif kernel["kernel"].startswith("attention") and scheme == "auto":
                        times.setdefault("kernel", []).append(kernel["ms"])
            for name, ms in peers(head_dim, causal, length).items():
                times.setdefault(name, []).append(ms)
            torch.cuda.empty_cache()
        best = {name: statistics.median(values) for name, values in times.items()}
        cells = "".join(f"{flops / best[c] / 1e9:>15.0f}" if c in best else f"{'-':>15}" for c in columns)
        ratio = lambda peer: f"{best[peer] / best['auto']:.2f}" if peer in best else "-"
        name = f"D{head_dim} {'causal ' if causal else ''}S{length}"
        kernel = flops / best["kernel"] / 1e9 if "kernel" in best else 0
        print(f"{name:<22}{cells}   {ratio('FA2'):>8}  {ratio('Sage1'):>10}   kernel alone {kernel:.0f}", flush=True)
    print("\npreparing kernels, share of the floor (bytes read and written once at 3.0 TB/s)")
    for (kernel, head_dim, length), shares in sorted(preparing.items()):
        print(f"  {kernel:<44} D{head_dim} S{length:<6} {statistics.median(shares):.0%}")


if __name__ == "__main__":
    main()
