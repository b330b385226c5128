#!/usr/bin/env python3
"""Time of one attention call spread over 1 to 64 GPUs, computed from rates and bytes; nothing is measured here.

    python3 scripts/multi_gpu_model.py [--tokens 75600] [--heads 40] [--kv-heads 40] [--tflops 802]

docs/performance/multi-gpu.md has the formulae in words and what follows from them.
"""

import argparse

HEAD_DIM = 128
# bf16, as tensors are when they travel.
BYTES = 2
# GPUs of one node, joined by NVLink.
NODE = 8
# Bytes a second that a GPU sends: NVLink of Hopper has 450 GB/s each way, and a network adapter of 400 Gbit/s 50; NCCL's
# large transfers are taken to reach four fifths of either.
NVLINK, NETWORK = 0.8 * 450e9, 0.8 * 50e9
# Bytes a second of the GPU's own memory, for merging.
MEMORY = 4.0e12


def bandwidth(gpus):
    """What a GPU sends, through the slowest link that the transfer crosses."""
    return NVLINK if gpus <= NODE else NETWORK


def compute(tokens, heads, gpus, rate):
    return 4 * tokens**2 * heads * HEAD_DIM / gpus / rate


def ulysses_bytes(tokens, heads, kv_heads, gpus):
    """Q and the output, K and V: each GPU keeps 1/gpus of its part and sends the rest."""
    part = tokens / gpus * HEAD_DIM * BYTES
    return (2 * heads + 2 * kv_heads) * part * (gpus - 1) / gpus


def ring_bytes(tokens, kv_heads, gpus):
    """K and V of all other GPUs."""
    return 2 * kv_heads * tokens / gpus * HEAD_DIM * BYTES * (gpus - 1)


def merging(tokens, heads, gpus):
    """Each step reads and writes the sum in float32 and reads its own part, of this GPU's queries."""
    return (gpus - 1) * tokens / gpus * heads * HEAD_DIM * (4 + 4 + BYTES) / MEMORY


def ulysses(tokens, heads, kv_heads, gpus, rate):
    """Seconds; None where heads cannot be dealt out."""
    if heads % gpus or kv_heads % gpus:
        return None
    return compute(tokens, heads, gpus, rate) + ulysses_bytes(tokens, heads, kv_heads, gpus) / bandwidth(gpus)


def gathered_ring(tokens, heads, kv_heads, gpus, rate):
    """As diffusers has it: keys and values of all are gathered first."""
    sent = ring_bytes(tokens, kv_heads, gpus) / bandwidth(gpus)
    return sent + compute(tokens, heads, gpus, rate) + merging(tokens, heads, gpus)


def overlapped_ring(tokens, heads, kv_heads, gpus, rate):
    """As yunchang and torch have it: the next part travels while this one is computed."""
    step = compute(tokens, heads, gpus, rate) / gpus
    sent = ring_bytes(tokens, kv_heads, gpus) / max(1, gpus - 1) / bandwidth(gpus)
    return step + (gpus - 1) * max(step, sent) + merging(tokens, heads, gpus)


def unified(tokens, heads, kv_heads, gpus, rate):
    """Ulysses within a node, whose links are fast, and an overlapped ring of nodes: its parts and its heads are a node's."""
    nodes = gpus // NODE
    if nodes < 2 or heads % NODE or kv_heads % NODE:
        return None
    # A node is to the ring what a GPU is, with an eighth of the heads in each of its GPUs.
    exchanged = ulysses_bytes(tokens / nodes, heads, kv_heads, NODE) / NVLINK
    step = compute(tokens, heads, gpus, rate) / nodes
    sent = ring_bytes(tokens, kv_heads / NODE, nodes) / (nodes - 1) / NETWORK
    return exchanged + step + (nodes - 1) * max(step, sent) + merging(tokens, heads / NODE, nodes)


WAYS = {
    "Ulysses": ulysses,
    "ring, gathered first": gathered_ring,
    "ring, overlapped": overlapped_ring,
    "Ulysses in nodes, ring of nodes": unified,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=75600)
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--tflops", type=float, default=802, help="of one GPU's attention, quantisation included")
    options = parser.parse_args()
    kv_heads = options.kv_heads or options.heads
    rate = options.tflops * 1e12
    alone = compute(options.tokens, options.heads, 1, rate)
    print(f"{options.tokens} tokens, {options.heads} heads ({kv_heads} of keys), {options.tflops:g} TFLOP/s: one GPU {alone * 1e3:.1f} ms\n")
    print("| GPUs | MB sent, Ulysses | MB sent, ring | " + " | ".join(WAYS) + " |")
    print("| --- " * (3 + len(WAYS)) + "|")
    for gpus in (2, 4, 8, 16, 32, 64):
        sent = [ulysses_bytes(options.tokens, options.heads, kv_heads, gpus), ring_bytes(options.tokens, kv_heads, gpus)]
        cells = [f"{x / 1e6:.0f}" for x in sent]
        for way in WAYS.values():
            seconds = way(options.tokens, options.heads, kv_heads, gpus, rate)
            cells.append("–" if seconds is None else f"{seconds * 1e3:.2f} ms, {alone / seconds:.1f}x")
        print(f"| {gpus} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
