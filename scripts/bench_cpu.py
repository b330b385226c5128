"""Measures attention on the CPU against PyTorch and candle, and prints Markdown tables.

scripts/bench_cpu.sh prepares everything and runs this; its first lines name the environment variables.

The machine's speed drifts, so for each shape the contestants take turns, one after the other, for several rounds;
a figure is the median over rounds, and the figure behind ± is half the distance between the fastest and the slowest
round. A call that takes very long is made in the first round only (marked *).
"""

import itertools
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

THREADS = int(os.environ.get("THREADS", "2"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
NAMES = ("torch", "candle", "full", "int8")
CONTESTANTS = os.environ.get("CONTESTANTS", "torch,candle,full,int8").split(",")
OUT_JSON = os.environ.get("OUT_JSON")
PEERS_BIN = os.environ.get("PEERS_BIN", "target/peers/release")
SAGEATTN = os.environ.get("SAGEATTN", "target/release/sageattn")

SECONDS = 1.0  # for a contestant's repeated calls in one turn
SLOW_MS = 5_000.0  # a call slower than this is made once, not once a round
CHECKED_ROWS = 4  # rows of each head that are compared with double precision, as candle-peer does

BATCH, HEADS = 1, 8
DECODE_KV_LEN = 8192
BYTES = {"f32": 4, "bf16": 2}


@dataclass(frozen=True)
class Shape:
    dtype: str
    batch: int
    heads: int
    q_len: int
    kv_len: int
    head_dim: int

    def __str__(self):
        return f"{self.dtype}:{self.batch}:{self.heads}:{self.q_len}:{self.kv_len}:{self.head_dim}"

    @classmethod
    def parse(cls, text):
        dtype, *sizes = text.split(":")
        return cls(dtype, *map(int, sizes))

    @property
    def title(self):
        lengths = f"S{self.q_len}" if self.q_len == self.kv_len else f"Q{self.q_len} KV{self.kv_len}"
        return f"{self.dtype} B{self.batch} H{self.heads} {lengths} D{self.head_dim}"

    @property
    def kv_bytes(self):
        return 2 * self.batch * self.heads * self.kv_len * self.head_dim * BYTES[self.dtype]


class Unavailable(Exception):
    """A contestant that cannot take part, and why."""


# ---------------------------------------------------------------------------------------------------------------------
# Torch, in a process of its own, started once, since it loads slowly.


def torch_worker():
    """Answers requests, a JSON list a line, with a JSON object a line.

    ["time", SHAPE]: times attention; ["write", SHAPE, FILE]: writes q, k and v as safetensors;
    ["error", SHAPE, FILE]: relative L1 error of the tensor `out` in FILE. Each is about the same random numbers.
    """
    import numpy
    import torch

    torch.set_num_threads(THREADS)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16}

    def inputs(shape):
        torch.manual_seed(0)
        rows = (shape.q_len, shape.kv_len, shape.kv_len)
        return [torch.randn(shape.batch, shape.heads, n, shape.head_dim).to(dtypes[shape.dtype]) for n in rows]

    def relative_l1(shape, out):
        q, k, v = inputs(shape)
        rows = slice(None, None, max(1, -(-shape.q_len // CHECKED_ROWS)))
        scores = q[:, :, rows].double() @ k.double().mT / shape.head_dim**0.5
        exact = scores.softmax(-1) @ v.double()
        return ((out[:, :, rows].double() - exact).abs().sum() / exact.abs().sum()).item()

    def write(shape, path):
        header, data = {}, []
        for name, tensor in zip("qkv", inputs(shape)):
            start = sum(map(len, data))
            data.append(tensor.view(torch.uint8).numpy().tobytes())
            entry = {"dtype": shape.dtype.upper(), "shape": list(tensor.shape), "data_offsets": [start, start + len(data[-1])]}
            header[name] = entry
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + b"".join(data))

    def read_out(shape, path):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entry = json.loads(file.read(length))["out"]
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            data = numpy.frombuffer(file.read(end - start), numpy.uint8).copy()
        return torch.from_numpy(data).view(dtypes[shape.dtype]).reshape(entry["shape"])

    def answer(what, shape, *path):
        if what == "time":
            q, k, v = inputs(shape)
            times, out = timed(lambda: sdpa(q, k, v))
            return {"median_ms": statistics.median(times), "relative_l1": relative_l1(shape, out)}
        if what == "write":
            write(shape, *path)
            return {}
        return {"relative_l1": relative_l1(shape, read_out(shape, *path))}

    hello = {"version": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    print(json.dumps(hello), flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            what, shape, *path = json.loads(line)
            print(json.dumps(answer(what, Shape.parse(shape), *path)), flush=True)


def timed(call):
    """Times in ms of repeated calls, by the rule of benches/peers: warm up once, then 3 to 200 calls in SECONDS."""

    def once():
        start = time.perf_counter()
        out = call()
        return (time.perf_counter() - start) * 1e3, out

    first, out = once()
    if first >= SECONDS * 1e3:
        return [first], out
    times = []
    while len(times) < 3 or (sum(times) < SECONDS * 1e3 and len(times) < 200):
        times.append(once()[0])
    return times, out


class Torch:
    """The process that runs `torch_worker`."""

    def __init__(self):
        env = dict(os.environ, OMP_NUM_THREADS=str(THREADS), MKL_NUM_THREADS=str(THREADS))
        command = [sys.executable, __file__, "--torch-worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        hello = self.answer()
        self.version = f"{hello['version']} ({hello['capability']})"

    def ask(self, *request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise Unavailable(f"the torch process ended with status {self.process.wait()}; its message is above")
        return json.loads(line)


# ---------------------------------------------------------------------------------------------------------------------
# Contestants: each has its turn at a shape, and answers {name: {"median_ms": …, "relative_l1": …}}.


class TorchContestant:
    names = ("torch",)

    def __init__(self, torch):
        self.torch = torch

    def turn(self, shape):
        return {"torch": self.torch.ask("time", str(shape))}


class CandleContestant:
    names = ("candle",)
    version = "candle-nn 0.11.1 attention::flash_attn, target-cpu=native"

    def __init__(self):
        self.program = os.path.join(PEERS_BIN, "candle-peer")
        if not os.path.exists(self.program):
            raise Unavailable(f"{self.program} does not exist: run scripts/bench_cpu.sh, which builds it")

    def turn(self, shape):
        return {"candle": json_of([self.program, "--threads", THREADS, "--seconds", SECONDS, shape])}


class OurContestant:
    """`sageattn bench`, which lets its schemes take turns within a process of its own."""

    def __init__(self, schemes, torch):
        self.names = tuple(schemes)
        self.torch = torch
        self.slowest_ms = {}
        self.errors = {}
        if not os.path.exists(SAGEATTN):
            raise Unavailable(f"{SAGEATTN} does not exist: run scripts/bench_cpu.sh, which builds it")
        done = subprocess.run([SAGEATTN, "--version"], capture_output=True, text=True, check=False)
        self.version = done.stdout.strip()
        if done.returncode != 0:
            raise Unavailable(f"`{SAGEATTN} --version` exited with {done.returncode}: {done.stderr.strip()}")

    def turn(self, shape):
        if shape not in self.errors:
            self.errors[shape] = {name: self.error(shape, name) for name in self.names} if self.torch else {}
        if shape not in self.slowest_ms:
            self.bench(shape, 1)
        rows = self.bench(shape, max(3, min(200, round(SECONDS * 1e3 / self.slowest_ms[shape]))))
        return {
            name: {"median_ms": rows[name]["median_ms"], "relative_l1": self.errors[shape].get(name)}
            for name in self.names
        }

    def bench(self, shape, reps):
        lengths = shape.q_len if shape.q_len == shape.kv_len else f"{shape.q_len}x{shape.kv_len}"
        sizes = f"{shape.batch},{shape.heads},{lengths},{shape.head_dim}"
        command = [SAGEATTN, "bench", "--json", "--threads", THREADS, "--reps", reps, "--dtype", shape.dtype]
        answer = json_of([*command, "--schemes", ",".join(self.names), "--shapes", sizes])
        rows = {row["scheme"]: row for row in answer.get("rows", [])}
        if any("median_ms" not in rows.get(name, {}) for name in self.names):
            raise Unavailable(f"`sageattn bench` answered {json.dumps(answer)[:200]}, expected rows of {self.names}")
        self.slowest_ms[shape] = max(rows[name]["median_ms"] for name in self.names)
        return rows

    def error(self, shape, scheme):
        with tempfile.TemporaryDirectory() as folder:
            qkv, out = os.path.join(folder, "qkv.safetensors"), os.path.join(folder, "out.safetensors")
            self.torch.ask("write", str(shape), qkv)
            json_of([SAGEATTN, "run", qkv, "-o", out, "--scheme", scheme, "--threads", THREADS, "--json"])
            return self.torch.ask("error", str(shape), out)["relative_l1"]


def json_of(command):
    """The JSON object that a command prints."""
    command = [str(word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Unavailable(f"`{' '.join(command)}` exited with {done.returncode}: {done.stderr.strip()}")
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError as error:
        raise Unavailable(f"`{' '.join(command)}` printed {done.stdout[:200]!r}, expected JSON: {error}") from error
    if not isinstance(answer, dict):
        raise Unavailable(f"`{' '.join(command)}` printed {done.stdout[:200]!r}, expected a JSON object")
    return answer


def contestants_of(problems):
    """Those asked for that can take part, and the versions of each."""

    def start(make, *arguments):
        try:
            return make(*arguments)
        except Unavailable as problem:
            problems.append(f"{make.__name__}: {problem}")
            progress(f"bench_cpu: without {make.__name__}: {problem}")
            return None

    torch = start(Torch) if "torch" in CONTESTANTS else None
    ours = [name for name in ("full", "int8") if name in CONTESTANTS]
    candle = start(CandleContestant) if "candle" in CONTESTANTS else None
    sageattn = start(OurContestant, ours, torch) if ours else None
    contestants = [TorchContestant(torch) if torch else None, candle, sageattn]
    versions = {"torch": torch, "candle": candle, "ours": sageattn}
    return [c for c in contestants if c], {name: c.version for name, c in versions.items() if c}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring.


def measure(shape, contestants, problems):
    """Every contestant's rounds at one shape, taken in turns; who begins changes from round to round."""
    turns = {name: [] for contestant in contestants for name in contestant.names}
    failed = set()
    for round_ in range(ROUNDS):
        first = round_ % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            slow = any(turn["median_ms"] > SLOW_MS for name in contestant.names for turn in turns[name])
            if slow or contestant in failed:
                continue
            try:
                answers = contestant.turn(shape)
            except Unavailable as problem:
                problems.append(f"{shape.title}: {problem}")
                progress(f"bench_cpu: {problems[-1]}")
                failed.add(contestant)
                continue
            for name, answer in answers.items():
                turns[name].append(answer)
                progress(f"  {shape.title} round {round_ + 1}: {name} {answer['median_ms']:.2f} ms")
    return {name: summary(rounds) for name, rounds in turns.items() if rounds}


def summary(rounds):
    times = [turn["median_ms"] for turn in rounds]
    median = statistics.median(times)
    return {
        "median_ms": median,
        "spread": (max(times) - min(times)) / 2 / median,
        "rounds_ms": times,
        "relative_l1": rounds[0]["relative_l1"],
    }


def read_bandwidth(sizes):
    """GB/s at which buffers of these sizes are read, again and again: what fits a cache is read faster."""
    program = os.path.join(PEERS_BIN, "read-bandwidth")
    return {size: json_of([program, "--threads", THREADS, size])["gb_per_s"] for size in sizes}


def progress(text):
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Printing.


def ms(result):
    if result is None:
        return "–"
    value = result["median_ms"]
    digits = 0 if value >= 1000 else 1 if value >= 10 else 3
    once = len(result["rounds_ms"]) < ROUNDS
    return f"{value:.{digits}f}*" if once else f"{value:.{digits}f} ±{result['spread']:.0%}"


def speedup(result, other):
    return "–" if None in (result, other) else f"{other['median_ms'] / result['median_ms']:.2f}×"


def error(result):
    return "–" if result is None or result["relative_l1"] is None else f"{result['relative_l1']:.1e}"


def table(header, rows):
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def timings_table(rows):
    header = ["shape", "torch ms", "candle ms", "full ms", "int8 ms", "full/torch", "int8/torch", "int8/candle"]
    out = []
    for shape, by_name in rows:
        torch, candle, full, int8 = (by_name.get(name) for name in NAMES)
        ratios = [speedup(full, torch), speedup(int8, torch), speedup(int8, candle)]
        out.append([shape.title, ms(torch), ms(candle), ms(full), ms(int8), *ratios])
    return table(header, out)


def accuracy_table(rows):
    out = [[shape.title, *(error(by_name.get(name)) for name in NAMES)] for shape, by_name in rows]
    return table(["shape", "torch", "candle", "full", "int8"], out)


def bandwidth_table(rows, bandwidth):
    def share(shape, result):
        if result is None:
            return "–"
        return f"{shape.kv_bytes / result['median_ms'] / 1e6 / bandwidth[shape.kv_bytes]:.0%}"

    header = ["shape", "K and V", "read at", "torch", "candle", "full", "int8"]
    out = []
    for shape, by_name in rows:
        size, speed = f"{shape.kv_bytes / 1e6:.1f} MB", f"{bandwidth[shape.kv_bytes]:.1f} GB/s"
        out.append([shape.title, size, speed, *(share(shape, by_name.get(name)) for name in NAMES)])
    return table(header, out)


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def busy_cores(seconds=2.0):
    """Cores that other work keeps busy, or None where the system does not tell. Threads that wait for each other, as
    torch's do, suffer more from it than those that steal work."""

    def ticks():
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, idle, iowait, *rest = map(int, file.readline().split()[1:])
        return idle + iowait, user + nice + system + idle + iowait + sum(rest[:3])

    try:
        idle, total = ticks()
        time.sleep(seconds)
        later_idle, later_total = ticks()
    except OSError:
        return None
    return os.cpu_count() * (1 - (later_idle - idle) / max(1, later_total - total))


def numbers(variable, default):
    return [int(n) for n in os.environ.get(variable, default).split(",") if n]


def main():
    unknown = [name for name in CONTESTANTS if name not in NAMES]
    if unknown:
        sys.exit(f"CONTESTANTS: value is {unknown[0]!r}, expected some of {','.join(NAMES)}")
    dtypes = os.environ.get("DTYPES", "f32,bf16").split(",")
    grid = list(itertools.product(dtypes, numbers("HEAD_DIMS", "64,128")))
    prefill = [Shape(t, BATCH, HEADS, s, s, d) for t, d in grid for s in numbers("SEQ_LENS", "512,2048,8192")]
    decode = [Shape(t, BATCH, HEADS, 1, DECODE_KV_LEN, d) for t, d in grid]

    problems = []
    contestants, versions = contestants_of(problems)
    if not contestants:
        sys.exit("bench_cpu: no contestant can run")

    busy = busy_cores()
    if busy is not None and busy > 0.2:
        problems.append(f"other work keeps {busy:.1f} cores busy: the comparison is not fair")
        progress(f"bench_cpu: {problems[-1]}")
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "busy_cores": busy, "system": platform.platform()}
    started = time.time()
    rows = [(shape, measure(shape, contestants, problems)) for shape in prefill]
    bandwidth = read_bandwidth(sorted({shape.kv_bytes for shape in decode}))
    decode_rows = [(shape, measure(shape, contestants, problems)) for shape in decode]

    others = "unknown" if busy is None else f"{busy:.1f}"
    print(f"{machine['cpu']}, {machine['cores']} cores, {others} busy with other work before the start; ", end="")
    print(f"{THREADS} threads, {ROUNDS} rounds, not causal; ± is half the range over rounds, * is one call.")
    print("; ".join(f"{name}: {version}" for name, version in versions.items()) + "\n")
    print(timings_table(rows + decode_rows) + "\n")
    print("Relative L1 error against double precision, standard normal inputs:\n")
    print(accuracy_table(rows + decode_rows) + "\n")
    print("Decode: keys and values read, as a share of the speed at which a buffer of that size can be read:\n")
    print(bandwidth_table(decode_rows, bandwidth))

    if OUT_JSON:
        document = {
            "machine": machine,
            "threads": THREADS,
            "rounds": ROUNDS,
            "seconds": time.time() - started,
            "versions": versions,
            "problems": problems,
            "read_gb_per_s": [{"bytes": size, "gb_per_s": speed} for size, speed in bandwidth.items()],
            "rows": [{"shape": asdict(shape), "results": results} for shape, results in rows + decode_rows],
        }
        with open(OUT_JSON, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
    for problem in problems:
        progress(f"bench_cpu: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    torch_worker() if "--torch-worker" in sys.argv else main()
