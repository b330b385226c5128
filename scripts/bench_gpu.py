"""Attention on a GPU beside its peers, in one run: our binary, PyTorch's FlashAttention-2 and cuDNN, FlashAttention-3,
SageAttention1, and the FP8 kernels of FlashAttention-3 and cuDNN.

    python3 scripts/bench_gpu.py PATH_OF_bench_gpu --schemes auto,full [--rounds 3] [--shapes NAME]
                                 [--lengths 4096,8192] [--seconds 480] [--json FILE]

Prints TFLOP/s of each shape, ours end to end with all of quantisation and, beside it, the attention kernel alone; then
ratios, with their range over the rounds; then what the preparing kernels reach of the memory's bandwidth, which is
measured first. Contestants take turns in each round, in reverse order in every second one. All time is the GPU's: calls
are queued in groups, so that a host that launches slowly costs nobody anything.

FP8 peers are timed on inputs that are FP8 already: kernels alone. A peer that is not installed, fails, or does not
compute what FlashAttention-2 computes is named and left out. Needs torch; takes `fa3-fwd==0.0.3`,
`nvidia-cudnn-frontend==1.18.0` and `sageattention==1.0.6` (Triton) where they can be imported.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time

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

# As in crates/sageattention/examples/bench_gpu/timing.rs, so that contestants are timed alike.
WARM_UP_MS = 100
GROUP_MS = 1
GROUPS, TIMED_MS = (7, 50), 80

# The least cosine between a peer's output and FlashAttention-2's: FP8 at its worst has 0.998 on these inputs.
ALIKE = 0.99


def calls_of_a_group(run):
    """How many calls last `GROUP_MS` together."""
    run()
    few = math.ceil(GROUP_MS / event_ms(run))
    return math.ceil(GROUP_MS * few / event_ms(lambda: [run() for _ in range(few)]))


def event_ms(work):
    """The GPU's time between two events around what is launched."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_of_groups(group, count, warm_up_ms):
    """Median time of a call, of groups of so many of them, after groups that keep the GPU busy."""
    spent = 0.0
    while spent < warm_up_ms:
        spent += event_ms(group)
    times = []
    while len(times) < GROUPS[0] or len(times) < GROUPS[1] and sum(times) * count < TIMED_MS:
        times.append(event_ms(group) / count)
    return statistics.median(times)


def median_ms(run):
    """Median time of a call, of groups of calls that last a millisecond or more."""
    count = calls_of_a_group(run)
    return median_of_groups(lambda: [run() for _ in range(count)], count, WARM_UP_MS)


def bandwidth():
    """Bytes a second of a large copy on this GPU, read and written: the floor of kernels that only move bytes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) * 1e3


def fp8(*tensors):
    return [x.to(torch.float8_e4m3fn) for x in tensors]


# Each peer: a function that imports what it needs and returns `prepare`, which takes q, k, v (bf16, `[batch, heads,
# length, head_dim]`) and whether the mask is causal, and returns a call without arguments that gives the output.


def sdpa(backend):
    def prepare(q, k, v, causal):
        def run():
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
                )

        return run

    return lambda: prepare


def fa3(convert=lambda *tensors: tensors):
    def load():
        from fa3_fwd_interface import flash_attn_func

        def prepare(q, k, v, causal):
            q, k, v = convert(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))

            def run():
                out = flash_attn_func(q, k, v, causal=causal)
                return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

            return run

        return prepare

    return load


def sage1():
    from sageattention import sageattn

    def prepare(q, k, v, causal):
        q, k, v = (x.half() for x in (q, k, v))
        return lambda: sageattn(q, k, v, is_causal=causal)

    return prepare


def cudnn_fp8():
    import cudnn

    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    e4m3, single = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT

    def prepare(q, k, v, causal):
        graph = cudnn.pygraph(
            handle=handle, io_data_type=e4m3, intermediate_data_type=single, compute_data_type=single
        )
        scalar = lambda x: torch.full((1, 1, 1, 1), x, dtype=torch.float32, device="cuda")
        # Inputs of N(0, 1) fit e4m3 as they are; probabilities and averages are small and move to its upper range.
        factors = {"descale_q": 1.0, "descale_k": 1.0, "descale_v": 1.0}
        factors |= {"scale_s": 256.0, "descale_s": 1 / 256, "scale_o": 16.0}
        inputs = dict(zip("qkv", fp8(q, k, v)))
        tensors = inputs | {name: scalar(x) for name, x in factors.items()}
        node = lambda name, x: graph.tensor(
            name=name, dim=list(x.shape), stride=list(x.stride()), data_type=e4m3 if name in inputs else single
        )
        nodes = {name: node(name, x) for name, x in tensors.items()}
        out_node, _, *amax_nodes = graph.sdpa_fp8(
            **nodes, attn_scale=q.shape[-1] ** -0.5, use_causal_mask=causal, generate_stats=False
        )
        # On Hopper the kernel writes e4m3 only.
        out = torch.empty_like(inputs["q"])
        outputs = [(out_node, out, e4m3), *((amax, scalar(0.0), single) for amax in amax_nodes)]
        for output, x, dtype in outputs:
            output.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride())).set_data_type(dtype)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")
        memory = {nodes[name]: x for name, x in tensors.items()} | {output: x for output, x, _ in outputs}

        def run():
            graph.execute(memory, workspace, handle=handle)
            return out

        return run

    return prepare


PEERS = {
    "FA2": sdpa(SDPBackend.FLASH_ATTENTION),
    "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "FA3": fa3(),
    "FA3-fp8": fa3(fp8),
    "cuDNN-fp8": cudnn_fp8,
    "Sage1": sage1,
}
SIXTEEN_BIT = ("FA2", "cuDNN", "FA3")
FP8 = ("FA3-fp8", "cuDNN-fp8")


class Complaints:
    """Who is left out and why, each once."""

    def __init__(self):
        self.made = set()

    def add(self, who, error, shape=None):
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        if (who, why) not in self.made:
            self.made.add((who, why))
            print(f"{who} left out{f' on {name_of(shape)}' if shape else ''}: {why}", flush=True)


class Peers:
    def __init__(self, complaints):
        self.complaints, self.found = complaints, {}
        for name, load in PEERS.items():
            try:
                self.found[name] = load()
            except Exception as error:
                complaints.add(name, error)

    def ready(self, shape):
        """Each peer's call on one shape."""
        head_dim, causal, batch, heads, kv_heads, length = shape
        random = lambda h: torch.randn(batch, h, length, head_dim, device="cuda", dtype=torch.bfloat16)
        q, k, v = random(heads), random(kv_heads), random(kv_heads)
        runs, expected = {}, None
        for name, prepare in self.found.items():
            try:
                run = prepare(q, k, v, causal)
                # One batch entry is enough to tell garbage.
                out = run()[:1].double().flatten()
                if expected is None:
                    expected = out
                cosine = torch.nn.functional.cosine_similarity(out, expected, dim=0).item()
                if not cosine > ALIKE:
                    raise ValueError(f"cosine with {next(iter(runs))}'s output is {cosine:.4f}, expected {ALIKE}")
                runs[name] = run
            except Exception as error:
                self.complaints.add(name, error, shape)
        return runs


class Ours:
    """Our binary, started once: it keeps its kernels and its memory from shape to shape."""

    def __init__(self, binary, schemes, complaints):
        self.arguments, self.complaints = [binary, ",".join(schemes), "-"], complaints
        self.process = None

    def times(self, shape):
        """For each scheme: milliseconds end to end, and of each kernel."""
        head_dim, causal, batch, heads, kv_heads, length = shape
        if self.process is None:
            self.process = subprocess.Popen(
                self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        line = f"{batch},{heads}/{kv_heads},{length},{head_dim}{',causal' * causal}"
        print(line, file=self.process.stdin, flush=True)
        found = {}
        while (line := self.process.stdout.readline()).strip():
            row = json.loads(line)
            if "error" in row:
                self.complaints.add(row["scheme"], row["error"], shape)
            else:
                found[row["scheme"]] = (row["ms"], {x["kernel"]: x["ms"] for x in row["kernels"]})
        if not line:
            status, self.process = self.process.wait(), None
            self.complaints.add("ours", f"bench_gpu ended with status {status}", shape)
        return found


def name_of(shape):
    head_dim, causal, batch, heads, kv_heads, length = shape
    grouped = "" if heads == kv_heads else f"/{kv_heads}"
    return f"B{batch} H{heads}{grouped} S{length} D{head_dim}{' causal' if causal else ''}"


def one_round(ours, runs, shape, order):
    """Milliseconds of each contestant, and of our kernels by scheme and name."""
    times, kernels = {}, {}

    def our_turn():
        for scheme, (ms, parts) in ours.times(shape).items():
            times[scheme] = ms
            for kernel, part in parts.items():
                kernels[scheme, kernel] = part

    def turn(name):
        try:
            times[name] = median_ms(runs[name])
        except Exception as error:
            ours.complaints.add(name, error, shape)

    turns = [our_turn, *(lambda name=name: turn(name) for name in runs)]
    for take in turns[::order]:
        take()
    return times, kernels


def is_fp8(kernel):
    return kernel.startswith("attention") and "_fp8_" in kernel


class Result:
    """A shape's rounds."""

    def __init__(self, shape, schemes, rounds):
        self.shape, self.schemes = shape, schemes
        self.rounds = [times | self.alone(kernels) for times, kernels in rounds]
        self.kernels = [kernels for _, kernels in rounds]
        timed = set().union(*self.rounds)
        self.ms = {name: statistics.median(r[name] for r in self.rounds if name in r) for name in timed}
        self.eight_bit = {scheme for kernels in self.kernels for scheme, kernel in kernels if is_fp8(kernel)}

    @staticmethod
    def alone(kernels):
        """Attention kernels alone, by `scheme kernel`."""
        return {f"{scheme} kernel": ms for (scheme, name), ms in kernels.items() if name.startswith("attention")}

    def tflops(self, name):
        head_dim, causal, batch, heads, _, length = self.shape
        flops = 4 * batch * heads * head_dim * length**2 / (2 if causal else 1)
        return f"{flops / self.ms[name] / 1e9:.0f}" if name in self.ms else "-"

    def fastest(self, names):
        return min((name for name in names if name in self.ms), key=self.ms.get, default=None)

    def ratio(self, ours, peers):
        """The best peer's time over ours: of medians, and the range of the rounds'."""
        peers = [name for name in peers if name in self.ms]
        if ours not in self.ms or not peers:
            return "-"
        of = lambda times: min(times[name] for name in peers) / times[ours]
        spread = [of(times) for times in self.rounds if {ours, *peers} <= times.keys()] or [math.nan]
        return f"{of(self.ms):.2f} ({min(spread):.2f}-{max(spread):.2f})"


def wrapped(name, width):
    """A name in lines of at most `width`, broken behind hyphens."""
    lines = [""]
    for i, part in enumerate(name.split("-")):
        part = part if i == 0 else f"-{part}"
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return lines


def throughput_header(schemes, peers):
    width = 13
    heads = [wrapped(scheme, width - 1) for scheme in schemes]
    height = max(map(len, heads))
    heads = [[""] * (height - len(lines)) + lines for lines in heads]
    print(f"\n{'TFLOP/s':<27}" + "".join(f"{lines[0]:>{width}}" for lines in heads))
    for row in range(1, height):
        print(f"{'':<27}" + "".join(f"{lines[row]:>{width}}" for lines in heads))
    ours = f"{'call':>7}{'alone':>6}" * len(schemes)
    print(f"{'':<27}{ours}" + "".join(f"{peer:>10}" for peer in peers), flush=True)


def throughput_row(result, peers):
    ours = "".join(f"{result.tflops(s):>7}{result.tflops(f'{s} kernel'):>6}" for s in result.schemes)
    print(f"{name_of(result.shape):<27}{ours}" + "".join(f"{result.tflops(p):>10}" for p in peers), flush=True)


def ratios(results):
    print("\nPeer's time over ours (range over the rounds)")
    columns = ["auto / 16-bit", "our best / 16-bit", "FP8 alone / FP8 peer", "full / FA3", "auto / Sage1"]
    print(f"{'':<27}" + "".join(f"{c:>22}" for c in columns) + "   best, best FP8; their peers")
    for r in results:
        best = r.fastest(r.schemes)
        narrow = r.fastest([f"{scheme} kernel" for scheme in r.schemes if scheme in r.eight_bit])
        cells = [
            r.ratio("auto", SIXTEEN_BIT),
            r.ratio(best, SIXTEEN_BIT),
            r.ratio(narrow, FP8),
            r.ratio("full", ["FA3"]),
            r.ratio("auto", ["Sage1"]),
        ]
        names = f"{best}, {(narrow or '-').removesuffix(' kernel')}; {r.fastest(SIXTEEN_BIT)}, {r.fastest(FP8)}"
        print(f"{name_of(r.shape):<27}" + "".join(f"{c:>22}" for c in cells) + f"   {names}")


def preparing(results, bytes_per_second):
    print(f"\nPreparing kernels: share of the floor, bytes read and written once at {bytes_per_second / 1e12:.2f} TB/s")
    shares = {}
    for r in results:
        head_dim, causal, batch, _, kv_heads, length = r.shape
        for kernels in r.kernels:
            # One scheme's measurement of a kernel is as good as another's.
            for (_, name), ms in kernels.items():
                if name.startswith("quantize") and not causal:
                    # 16-bit elements read, 8-bit elements written.
                    floor = 3 * batch * kv_heads * length * head_dim / bytes_per_second * 1e3
                    shares.setdefault((name.split("_d")[0], head_dim), {}).setdefault(length, []).append(floor / ms)
    for (name, head_dim), by_length in sorted(shares.items()):
        cells = "".join(f"  S{n} {statistics.median(x):.0%}" for n, x in sorted(by_length.items()))
        print(f"  {name:<50} D{head_dim:<4}{cells}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--schemes", required=True, help="names of presets, or auto, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", choices=SHAPES, default="all")
    parser.add_argument("--lengths", default="", help="only these of the lengths")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no shape after this time")
    parser.add_argument("--json", help="file for the times of every round, in milliseconds")
    options = parser.parse_args()
    begun = time.monotonic()
    schemes = options.schemes.split(",")
    lengths = [int(n) for n in options.lengths.split(",") if n]
    shapes = [shape for shape in SHAPES[options.shapes] if not lengths or shape[-1] in lengths]

    complaints = Complaints()
    peers = Peers(complaints)
    ours = Ours(options.binary, schemes, complaints)
    bytes_per_second = bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, copies {bytes_per_second / 1e12:.2f} TB/s, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}; ours f16, peers bf16 or FP8; {options.rounds} rounds"
    )
    throughput_header(schemes, peers.found)
    results = []
    for shape in shapes:
        if time.monotonic() - begun > options.seconds:
            print(f"{name_of(shape)} and what follows left out: {options.seconds:.0f} seconds are over")
            break
        runs = peers.ready(shape)
        rounds = [one_round(ours, runs, shape, (-1) ** i) for i in range(options.rounds)]
        del runs
        torch.cuda.empty_cache()
        results.append(Result(shape, schemes, rounds))
        throughput_row(results[-1], peers.found)
    ratios(results)
    preparing(results, bytes_per_second)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([{"shape": name_of(r.shape), "rounds": r.rounds} for r in results], file, indent=1)
    print(f"\n{time.monotonic() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
