"""Our default choice on many shapes, large and small, beside the fastest 16-bit peer: time of the GPU alone, in CUDA
graphs.

    python3 scripts/sweep_gpu.py PATH_OF_bench_gpu [--rounds 3] [--only decode,short] [--alternatives] [--peers FA3,cuDNN]
                                 [--shapes "4,32,4096,128;…"] [--warm-up 100] [--seconds 480] [--json FILE]

Prints, for each shape, microseconds of ours and of the fastest peer, and their ratio with its range over the rounds;
then for each family of shapes and all of them the geometric mean of the ratios, the worst, and the share below 0.97.
With `--alternatives` every way that our planner weighs is timed as well, and the plan's regret is printed: the time of
its choice over that of the best of them. Contestants take turns in each round, in reverse order in every second one.

Peers are those of `scripts/bench_gpu.py` that compute in 16 bits, and FlashAttention-4 (`flash-attn-4`) where it can be
imported. All inputs are bf16 and normally distributed. A peer that fails on a shape, or does not compute what the others
do, is named and left out there. Needs torch.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import time
import warnings
from dataclasses import dataclass

import torch
from bench_gpu import ALIKE, WARM_UP_MS, Complaints, calls_of_a_group, fa3, median_of_groups, sdpa
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

# Below this ratio a shape counts as slower than the peer.
LEVEL = 0.97


@dataclass(frozen=True)
class Shape:
    """A call; `mask` is None, "causal" (the last query sees the last key), or a mask of `bench_gpu`."""

    family: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    mask: str | None = None
    value_dim: int | None = None

    def __str__(self):
        heads = f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else f"{self.heads}"
        length = f"{self.q_len}x{self.kv_len}" if self.q_len != self.kv_len else f"{self.q_len}"
        mask = {None: "", "causal": ",causal"}.get(self.mask, f",mask={self.mask}")
        dims = f"{self.head_dim}/{self.value_dim}" if self.value_dim else f"{self.head_dim}"
        return f"{self.batch},{heads},{length},{dims}{mask}"

    @property
    def has_many_queries(self):
        return self.q_len >= 128


def shapes():
    """All shapes, by family."""
    decode = [
        *itertools.product((1, 4, 16, 64), ((32, 8), (12, 12)), (1024, 4096), (128,)),
        *((1, heads, length, 128) for heads in ((32, 8), (64, 8), (12, 12), (32, 1)) for length in (8192, 16384, 65536)),
        (4, (64, 8), 8192, 128),
        (64, (32, 8), 2048, 128),
        (32, (16, 16), 2048, 64),
        (8, (9, 3), 4096, 64),
        (1, (9, 3), 8192, 64),
        (8, (16, 8), 4096, 256),
        (256, (32, 8), 512, 128),
    ]
    yield from (Shape("decode", b, h, hk, 1, n, d) for b, (h, hk), n, d in decode)

    few = [(8, (32, 8), 4, 4096), (1, (32, 8), 8, 16384), (4, (32, 8), 16, 8192), (2, (16, 16), 64, 4096)]
    few += [(1, (64, 8), 2, 32768), (16, (32, 8), 4, 2048)]
    yield from (Shape("few queries", b, h, hk, q, k, 128, "causal") for b, (h, hk), q, k in few)

    # Vision transformers, windows of images, encoders of text.
    short = [
        (64, 12, 197, 64), (32, 16, 257, 64), (16, 16, 577, 64), (256, 4, 49, 32), (128, 8, 64, 64), (64, 12, 128, 32),
        (32, 12, 256, 64), (32, 12, 512, 64), (8, 16, 729, 72), (4, 16, 1024, 80), (16, 12, 384, 64), (8, 12, 512, 64),
        (2, 10, 1111, 72), (1, 24, 512, 128), (4, 24, 256, 128), (2, 24, 768, 128), (1, 16, 1024, 64), (1, 8, 2048, 64),
        (16, 8, 256, 128), (64, 8, 256, 96),
    ]  # fmt: skip
    yield from (Shape("short", b, h, h, n, n, d) for b, h, n, d in short)

    # Cross attention with few keys: text beside images and video.
    cross = [
        (1, 24, 17776, 512, 128), (2, 30, 17550, 226, 64), (1, 40, 32760, 512, 128), (2, 10, 4096, 77, 64),
        (2, 20, 1024, 77, 64), (2, 8, 4096, 77, 40), (1, 24, 4096, 256, 128), (4, 16, 1024, 300, 72),
        (1, 16, 8192, 128, 128), (2, 12, 6000, 257, 128),
    ]  # fmt: skip
    yield from (Shape("cross", b, h, h, q, k, d) for b, h, q, k, d in cross)

    middle = [
        *itertools.product((1, 4), (24, 32), (1024, 1536, 2048, 3072), (128,)),
        *itertools.product((2,), (16,), (1024, 1536, 2048, 3000), (64, 96)),
        (1, 16, 1024, 256), (1, 16, 2048, 256), (4, 8, 1500, 80), (8, 20, 1500, 64), (3, 20, 1333, 128), (2, 24, 1178, 64),
        (2, 10, 2048, 160), (2, 8, 4096, 40), (1, 38, 1178, 64), (2, 5, 4096, 64),
    ]  # fmt: skip
    yield from (Shape("middle", b, h, h, n, n, d) for b, h, n, d in middle)

    large = [
        (1, 24, 4608, 128), (1, 24, 8448, 128), (4, 32, 4096, 128), (4, 32, 8192, 128), (1, 24, 17776, 128),
        (3, 20, 5333, 128), (1, 40, 14040, 128), (2, 24, 4173, 64), (2, 16, 4250, 64), (4, 32, 4096, 64),
        (1, 24, 9000, 64), (1, 16, 8192, 256), (2, 16, 6000, 96), (2, 16, 4096, 80), (2, 16, 4096, 72), (1, 12, 12345, 112),
    ]  # fmt: skip
    yield from (Shape("large", b, h, h, n, n, d) for b, h, n, d in large)

    causal = [
        (8, 32, 8, 512, 128), (8, 32, 8, 256, 128), (1, 32, 8, 512, 128), (1, 32, 8, 1024, 128), (1, 32, 8, 2048, 128),
        (1, 32, 8, 4096, 128), (1, 32, 8, 8192, 128), (4, 32, 8, 1024, 128), (4, 32, 8, 2048, 128), (16, 32, 8, 777, 128),
        (1, 64, 8, 3000, 128), (4, 32, 32, 1024, 128), (4, 32, 32, 2048, 128), (4, 32, 32, 4096, 128), (1, 9, 3, 2048, 64),
        (4, 9, 3, 1024, 64), (8, 16, 16, 512, 64), (4, 16, 16, 1024, 64), (4, 32, 32, 4096, 64), (1, 14, 2, 3000, 64),
        (2, 16, 8, 1024, 256), (2, 16, 8, 2048, 256), (4, 32, 8, 1500, 96), (32, 12, 12, 300, 64), (2, 28, 4, 5000, 128),
        (1, 32, 8, 16384, 128),
    ]  # fmt: skip
    yield from (Shape("causal", b, h, hk, n, n, d, "causal") for b, h, hk, n, d in causal)
    chunks = [(1, 32, 8, 512, 4096), (1, 32, 8, 2048, 8192), (4, 32, 8, 128, 2048), (1, 32, 8, 128, 16384)]
    yield from (Shape("causal", b, h, hk, q, k, 128, "causal") for b, h, hk, q, k in chunks)

    grouped = [(1, 32, 8, 2048, 128), (2, 16, 4, 1024, 64), (1, 28, 4, 4096, 128), (4, 64, 8, 512, 128), (1, 48, 8, 1500, 128)]
    yield from (Shape("grouped", b, h, hk, n, n, d) for b, h, hk, n, d in grouped)

    # Latent attention (MLA): prefill, whose values have fewer channels than its keys.
    latent = [(1, 128, 4096, "causal"), (1, 16, 8192, "causal"), (2, 32, 1024, "causal"), (1, 24, 4096, None)]
    yield from (Shape("MLA", b, h, h, n, n, 192, mask, 128) for b, h, n, mask in latent)

    masks = itertools.product((2,), (24,), (512, 1024, 4608), (128,), ("padding", "dense", "bias"))
    yield from (Shape("masks", b, h, h, n, n, d, mask) for b, h, n, d, mask in masks)


def graph_ms(run, warm_up_ms):
    """Median time of a call in CUDA graphs of calls that last a millisecond or more together."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        count = calls_of_a_group(run)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count):
                run()
        return median_of_groups(graph.replay, count, warm_up_ms)


# Each peer: a function that imports what it needs and returns `prepare`, which takes q, k, v (`[batch, heads, length,
# head_dim]`) and a shape, and returns a call without arguments that gives the output.


def mask_of(shape):
    """The explicit mask of a shape, as `bench_gpu` makes it."""
    scores = (1, 1, shape.q_len, shape.kv_len)
    if shape.mask == "padding":
        return (torch.arange(shape.kv_len, device="cuda") < shape.kv_len - shape.kv_len // 10).view(1, 1, 1, -1)
    if shape.mask == "dense":
        return torch.rand(scores, device="cuda") < 0.5
    if shape.mask == "bias":
        return torch.randn(scores, device="cuda", dtype=torch.bfloat16)
    return None


def torch_peer(backend):
    def prepare(q, k, v, shape):
        square = shape.q_len == shape.kv_len
        if shape.mask == "causal" and not square and backend != SDPBackend.FLASH_ATTENTION:
            raise ValueError("no causal mask whose last query sees the last key")
        if shape.mask in (None, "causal") and (square or shape.mask is None):
            return sdpa(backend)()(q, k, v, shape.mask == "causal")
        mask = causal_lower_right(shape.q_len, shape.kv_len) if shape.mask == "causal" else mask_of(shape)

        def run():
            with sdpa_kernel(backend):
                grouped = shape.heads != shape.kv_heads
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)

        return run

    return lambda: prepare


def without_masks(load):
    """A peer that has causal masks, of the last query and the last key, and no others."""

    def loaded():
        prepare_causal = load()

        def prepare(q, k, v, shape):
            if shape.mask not in (None, "causal"):
                raise ValueError("no explicit masks")
            return prepare_causal(q, k, v, shape.mask == "causal")

        return prepare

    return loaded


def fa4():
    from flash_attn.cute import flash_attn_func

    def prepare(q, k, v, causal):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))

        def run():
            out = flash_attn_func(q, k, v, causal=causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run

    return prepare


PEERS = {
    "FA2": torch_peer(SDPBackend.FLASH_ATTENTION),
    "cuDNN": torch_peer(SDPBackend.CUDNN_ATTENTION),
    "efficient": torch_peer(SDPBackend.EFFICIENT_ATTENTION),
    "FA3": without_masks(fa3()),
    "FA4": without_masks(fa4),
}


class Peers:
    def __init__(self, names, complaints):
        self.complaints, self.found = complaints, {}
        for name in names:
            try:
                self.found[name] = PEERS[name]()
            except Exception as error:
                complaints.add(name, error)

    def ready(self, shape):
        """Each peer's call on one shape."""
        random = lambda *sizes: torch.randn(shape.batch, *sizes, device="cuda", dtype=torch.bfloat16)
        q, k = random(shape.heads, shape.q_len, shape.head_dim), random(shape.kv_heads, shape.kv_len, shape.head_dim)
        v = random(shape.kv_heads, shape.kv_len, shape.value_dim or shape.head_dim)
        runs, expected = {}, None
        for name, prepare in self.found.items():
            try:
                run = prepare(q, k, v, shape)
                out = run()[:1].double().flatten()
                expected = out if expected is None else expected
                cosine = torch.nn.functional.cosine_similarity(out, expected, dim=0).item()
                # Peers draw dense masks of their own.
                if not cosine > ALIKE and shape.mask not in ("dense", "bias"):
                    raise ValueError(f"cosine with {next(iter(runs))}'s output is {cosine:.4f}, expected {ALIKE}")
                runs[name] = run
            except Exception as error:
                self.complaints.made.add((name, str(shape)))
                self.complaints.lines.append(f"{name} on {shape}: {str(error).strip().splitlines()[0]}")
        return runs


class SweepComplaints(Complaints):
    """Who is left out and why; what fails on single shapes is kept for the file."""

    def __init__(self):
        super().__init__()
        self.lines = []


class Ours:
    """Our binary, started once: it keeps its kernels and its memory from shape to shape."""

    def __init__(self, binary, choices, alternatives, warm_up_ms):
        flags = ["--bf16", f"--warm-up={warm_up_ms}", "--alternatives" if alternatives else "--graphs"]
        self.process = subprocess.Popen(
            [binary, *flags, ",".join(choices), "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def rows(self, shape):
        print(shape, file=self.process.stdin, flush=True)
        rows = []
        while (line := self.process.stdout.readline()).strip():
            rows.append(json.loads(line))
        if not line:
            raise SystemExit(f"{shape}: bench_gpu ended with status {self.process.wait()}")
        return rows


def one_round(ours, runs, shape, order, warm_up_ms, failures):
    """Milliseconds of each contestant."""
    times = {}

    def our_turn():
        for row in ours.rows(shape):
            if "error" in row:
                failures.append(f"{row['scheme']} on {shape}: {row['error']}")
            else:
                times[row["scheme"]] = row["ms"]

    def turn(name):
        try:
            times[name] = graph_ms(runs[name], warm_up_ms)
        except Exception as error:
            failures.append(f"{name} on {shape}: {str(error).strip().splitlines()[0]}")

    turns = [our_turn, *(lambda name=name: turn(name) for name in runs)]
    for take in turns[::order]:
        take()
    return times


class Result:
    """A shape's rounds."""

    def __init__(self, shape, choice, peers, rounds, alternatives):
        self.shape, self.choice, self.rounds, self.alternatives = shape, choice, rounds, alternatives
        self.ms = {name: statistics.median(r[name] for r in rounds if name in r) for name in set().union(*rounds)}
        timed = [name for name in peers if name in self.ms]
        self.peer = min(timed, key=self.ms.get, default=None)
        of = lambda times: min(times[name] for name in timed if name in times) / times[choice]
        complete = [r for r in rounds if choice in r and any(name in r for name in timed)]
        self.ratio = of(self.ms) if choice in self.ms and timed else None
        self.spread = [of(r) for r in complete]

    def regret(self):
        """The choice's time over that of the best alternative, and that one; of those that are accurate enough."""
        timed = [row for row in self.alternatives if "ms" in row and row["scheme"] == self.choice]
        if not timed or self.choice not in self.ms:
            return None
        best = min(timed, key=lambda row: row["ms"])
        return max(1.0, self.ms[self.choice] / best["ms"]), best

    def line(self):
        us = lambda name: f"{self.ms[name] * 1e3:9.1f}" if name in self.ms else f"{'-':>9}"
        ratio = f"{self.ratio:.2f} ({min(self.spread):.2f}-{max(self.spread):.2f})" if self.ratio else "-"
        regret = self.regret()
        best = f"  {regret[0]:.2f} {regret[1]['computed']} {regret[1]['tiling']} /{regret[1]['splits']}" if regret else ""
        return f"{self.shape!s:<34}{us(self.choice)}{us(self.peer)} {self.peer or '-':<9} {ratio:<17}{best}"


def summary(title, results):
    ratios = [r.ratio for r in results if r.ratio]
    regrets = [r.regret()[0] for r in results if r.regret()]
    line = f"{title:<24}{len(results):>4} shapes"
    if ratios:
        below = sum(ratio < LEVEL for ratio in ratios) / len(ratios)
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        line += f"   geometric mean {mean:.3f}, worst {min(ratios):.2f}, below {LEVEL} {below:.0%}"
    if regrets:
        line += f"   regret mean {statistics.fmean(regrets):.3f}, worst {max(regrets):.2f}"
    print(line)


def warm_up(seconds=1.0):
    """Keeps the GPU busy: one that waited has lowered its clock, which the first contestants would pay for."""
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        x @ x
        torch.cuda.synchronize()


def keep(path, results, left_out):
    """Writes what there is so far."""
    rows = [
        {"shape": str(r.shape), "family": r.shape.family, "rounds": r.rounds, "alternatives": r.alternatives}
        for r in results
    ]
    with open(path, "w") as file:
        json.dump({"gpu": torch.cuda.get_device_name(), "shapes": rows, "left_out": left_out}, file, indent=1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--choices", default="auto,full,int8-fp8", help="what of ours is timed, the first in ratios")
    parser.add_argument("--peers", default=",".join(PEERS), help="names with commas, or none")
    parser.add_argument("--only", default="", help="only these families of shapes")
    parser.add_argument("--shapes", default="", help="only these shapes, as they are printed, with semicolons")
    parser.add_argument("--warm-up", type=int, default=WARM_UP_MS, metavar="MS", help="time before a call is timed")
    parser.add_argument("--alternatives", action="store_true", help="time all that the planner weighs, in one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no shape after this time")
    parser.add_argument("--json", help="file for all times, in milliseconds")
    options = parser.parse_args()
    begun = time.monotonic()
    # Torch says at length why a backend does not take a shape.
    warnings.filterwarnings("ignore", category=UserWarning)
    choices, families = options.choices.split(","), [name for name in options.only.split(",") if name]
    named = [name for name in options.shapes.split(";") if name]
    complaints = SweepComplaints()
    peers = Peers([name for name in options.peers.split(",") if name and name != "none"], complaints)
    ours = Ours(options.binary, choices, False, options.warm_up)
    weighed = Ours(options.binary, [choices[0], "auto@0.05"], True, options.warm_up) if options.alternatives else None
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; bf16")
    print(f"{'':<34}{choices[0] + ' µs':>9}{'peer µs':>9} {'':<9} peer / ours", flush=True)
    results = []
    warm_up()
    for shape in shapes():
        if families and shape.family not in families or named and str(shape) not in named:
            continue
        if time.monotonic() - begun > options.seconds:
            print(f"{shape} and what follows left out: {options.seconds:.0f} seconds are over")
            break
        runs = peers.ready(shape)
        rounds = [
            one_round(ours, runs, shape, (-1) ** i, options.warm_up, complaints.lines) for i in range(options.rounds)
        ]
        del runs
        torch.cuda.empty_cache()
        alternatives = weighed.rows(shape) if weighed else []
        results.append(Result(shape, choices[0], peers.found, rounds, alternatives))
        print(results[-1].line(), flush=True)
        if options.json:
            keep(options.json, results, complaints.lines)
    print()
    for family in dict.fromkeys(r.shape.family for r in results):
        summary(family, [r for r in results if r.shape.family == family])
    summary("128 queries and more", [r for r in results if r.shape.has_many_queries])
    summary("all", results)
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
