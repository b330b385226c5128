"""Time of attention over some blocks of the score matrix, beside the sparse kernels of others, in one run.

    python3 scripts/bench_sparse.py [--shapes 24x17776,40x75600] [--densities 1,0.5,0.25,0.1,0.05] [--json FILE]

Batch 1, head_dim 128, bf16, tensors as users have them. Ours computes INT8 QK with FP8 values: over a random map that
is given, in blocks of 128 x 64 and of 64 x 128, and over a map that is predicted in the call: by SLA (the means of blocks
alone) and by SpargeAttn (with their self-similarity); and by SLA where the blocks left out count with their means.
`sageattn sparse --video 9x24x30 --device cuda:0 --scheme int8-fp8 --predictor sla --topk 0.05,0.1,0.2,0.3
--pooled-tail` has errors beside times. Peers are FlexAttention (torch, compiled, bf16, blocks of
128 x 128) and Sol-Attn of comfy-kitchen (bf16, blocks of 64 x 64, with and without its pooled tail); one that is not
installed is named and left out. Contestants take turns; of each, the median of its rounds. Random maps and random
inputs have no structure: they tell time, not quality.

Needs a CUDA GPU, torch and both wheels of this repository, `sageattention` and `sageattention-shims`.
"""

import argparse
import functools
import json
import statistics
import sys

import sageattention
import torch
from bench_gpu import median_ms
from sageattention.sparse import Predictor, sparse_attention
from spas_sage_attn import block_sparse_sage2_attn_cuda

SCHEME = "int8-fp8"
HEAD_DIM = 128


def random_map(heads, tokens, sizes, density):
    """The same number of random blocks of keys for every block of queries, `[1, heads, q_blocks, k_blocks]`."""
    rows, columns = (-(-tokens // size) for size in sizes)
    order = torch.rand(1, heads, rows, columns, device="cuda").argsort(dim=-1)
    return (order < max(1, round(density * columns))).contiguous()


def ours_given(sizes):
    def prepare(q, k, v, density):
        blocks = random_map(q.shape[1], q.shape[2], sizes, density)
        return lambda: block_sparse_sage2_attn_cuda(q, k, v, blocks)

    return prepare


def ours_predicted(predictor, tail=False):
    def prepare(q, k, v, density):
        chosen = predictor(density)
        return lambda: sparse_attention(q, k, v, chosen, scheme=SCHEME, pooled_tail=tail)

    return prepare


def flex_attention(q, k, v, density):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = random_map(q.shape[1], q.shape[2], (128, 128), density)
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    # All blocks are whole, but for the last column, whose end the kernel itself knows.
    none, whole = torch.zeros_like(counts), counts
    mask = BlockMask.from_kv_blocks(none, indices, whole, indices, BLOCK_SIZE=128, seq_lengths=(q.shape[2], k.shape[2]))
    compiled = compiled_flex_attention(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask)


@functools.cache
def compiled_flex_attention(flex_attention):
    return torch.compile(flex_attention, dynamic=False)


def sol_attn(tail):
    def prepare(q, k, v, density):
        import comfy_kitchen

        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        return lambda: comfy_kitchen.sol_attn(q, k, v, topk_ratio=density, tail=tail)

    return prepare


CONTESTANTS = {
    "given 128x64": ours_given((128, 64)),
    "given 64x128": ours_given((64, 128)),
    "SLA 128x64": ours_predicted(lambda d: Predictor.sla(d).replace(block_q=128)),
    "SLA 64x128": ours_predicted(lambda d: Predictor.sla(d).replace(block_k=128)),
    "SLA 64x64": ours_predicted(Predictor.sla),
    "SLA 128x64, tail": ours_predicted(lambda d: Predictor.sla(d).replace(block_q=128), tail=True),
    "SLA 64x64, tail": ours_predicted(Predictor.sla, tail=True),
    "SpargeAttn": ours_predicted(lambda d: Predictor.sparge_attn(topk=d, simthreshd1=-1.0)),
    "FlexAttention": flex_attention,
    "Sol-Attn": sol_attn(tail=True),
    "Sol-Attn, no tail": sol_attn(tail=False),
}


def one_shape(heads, tokens, densities, rounds, left_out):
    q, k, v = (torch.randn(1, heads, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    times = {("dense", None): []}
    runs = {("dense", None): lambda: sageattention.sageattn(q, k, v, scheme=SCHEME)}
    for density in densities:
        for name, prepare in CONTESTANTS.items():
            if name in left_out:
                continue
            try:
                run = prepare(q, k, v, density)
                run()
            except Exception as error:  # noqa: BLE001 - whatever a peer raises, the others go on
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                # What is not installed is so at every density.
                left_out[name if isinstance(error, ImportError) else f"{name}, density {density}"] = why
                continue
            runs[name, density], times[name, density] = run, []
    for turn in range(rounds):
        order = list(runs) if turn % 2 == 0 else list(reversed(runs))
        for key in order:
            times[key].append(median_ms(runs[key]))
    return times


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="24x17776,40x75600", help="heads x tokens, with commas")
    parser.add_argument("--densities", default="1,0.5,0.25,0.1,0.05")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file for the times of every round, in milliseconds")
    arguments = parser.parse_args()
    densities = [float(density) for density in arguments.densities.split(",")]

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, milliseconds (times of the first column's)")
    record, left_out = [], {}
    for shape in arguments.shapes.split(","):
        heads, tokens = (int(number) for number in shape.split("x"))
        times = one_shape(heads, tokens, densities, arguments.rounds, left_out)
        median = {key: statistics.median(of_round) for key, of_round in times.items()}
        dense = median["dense", None]
        print(f"\n{heads} heads, {tokens} tokens, head_dim {HEAD_DIM}: dense {dense:.3f} ms by {SCHEME}")
        names = [name for name in CONTESTANTS if any(name == of for of, _ in times)]
        print("density  " + "".join(f"{name:>20}" for name in names))
        for density in densities:
            first = median[names[0], density]
            cells = [
                f"{median[name, density]:.3f} ({median[name, density] / first:.2f})"
                if (name, density) in median
                else "-"
                for name in names
            ]
            print(f"{density:<9}" + "".join(f"{cell:>20}" for cell in cells))
        allowed = {density: density * dense + 0.08 * dense for density in densities}
        print("d x dense + 8% of dense: " + ", ".join(f"{d}: {ms:.3f}" for d, ms in allowed.items()))
        record += [
            {"heads": heads, "tokens": tokens, "contestant": name, "density": density, "ms": of_round}
            for (name, density), of_round in times.items()
        ]
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
