"""What each of our GPU kernels uses of the machine, by NVIDIA's Nsight Compute (`ncu`).

    python3 scripts/profile_gpu.py PATH_OF_bench_gpu --schemes auto,full [--shapes 4,32,4096,128 ...]

One row for each kernel of a call: time, clock, and how busy it keeps tensor cores (of the cycles in which a
multiprocessor has work), instruction issue, the unit of exponentials, shared memory's banks and its load and store
pipe, and memory. For attention kernels also their time over the floor: that of tensor cores or exponentials, whichever
is longer, at the clock of the measurement. Clocks are left as they are. Launches stand alone here, with cold caches:
`bench_gpu.py` is the one that measures speed.
"""

import argparse
import csv
import glob
import json
import os
import shutil
import subprocess
import tempfile

SHAPES = [f"4,{sizes}{causal}" for sizes in ("32,4096,128", "32,4096,64", "16,4096,256") for causal in ("", ",causal")]

# Of one of Hopper's multiprocessors in a clock: multiply-adds by bits of the operands, and exponentials.
MULTIPLY_ADDS = {16: 2048, 8: 4096}
EXPONENTIALS = 16

ACTIVE, ELAPSED = "avg.pct_of_peak_sustained_active", "avg.pct_of_peak_sustained_elapsed"
# Columns of percentages: the first metric of each that this ncu knows.
PERCENTAGES = {
    "tensor": [f"sm__pipe_tensor_cycles_active.{ACTIVE}", f"sm__inst_executed_pipe_tensor_op_gmma.{ACTIVE}"],
    "issue": [f"sm__issue_active.{ACTIVE}", f"sm__inst_issued.{ACTIVE}"],
    "xu": [f"sm__inst_executed_pipe_xu.{ACTIVE}"],
    "banks": [f"l1tex__data_bank_reads.{ELAPSED}"],
    "lsu": [f"l1tex__data_pipe_lsu_wavefronts_mem_shared.{ELAPSED}", f"l1tex__data_pipe_lsu_wavefronts.{ELAPSED}"],
    "dram": [f"dram__throughput.{ELAPSED}", f"gpu__dram_throughput.{ELAPSED}"],
}
TIME, CLOCKS, CLOCK = "gpu__time_duration.sum", "sm__cycles_elapsed.sum", "sm__cycles_elapsed.avg.per_second"


def find_ncu():
    elsewhere = ["/usr/local/cuda/bin/ncu", *sorted(glob.glob("/opt/nvidia/nsight-compute/*/ncu"), reverse=True)]
    found = shutil.which("ncu") or next((path for path in elsewhere if os.access(path, os.X_OK)), None)
    if not found:
        print("left out: there is no ncu here")
        raise SystemExit
    return found


def known_metrics(ncu):
    """Base names that this ncu measures on this GPU; none where it does not say."""
    listing = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True)
    return {line.split()[0] for line in listing.stdout.splitlines() if "__" in line.split(" ")[0]}


def chosen(known):
    """The metric of each column."""
    base = lambda metric: metric.split(".")[0]
    columns = {}
    for column, candidates in PERCENTAGES.items():
        found = next((metric for metric in candidates if not known or base(metric) in known), None)
        if found:
            columns[column] = found
        else:
            print(f"column {column} left out: this ncu has none of {', '.join(map(base, candidates))}")
    return columns


def launches(log):
    """The kernels in ncu's table in the order of their launches: `(name, {metric: value})`."""
    with open(log) as file:
        lines = file.read().splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        exit("ncu measured nothing:\n" + "\n".join(lines[-20:]))
    table = csv.DictReader(lines[start:])
    found = {}
    for row in table:
        # A second line names the units where metrics are columns.
        if not (row["ID"] or "").isdigit():
            continue
        name, metrics = found.setdefault(int(row["ID"]), (row["Kernel Name"], {}))
        # One row for each metric, or one column.
        pairs = [(row["Metric Name"], row["Metric Value"])] if "Metric Name" in row else row.items()
        for metric, value in pairs:
            try:
                metrics[metric] = float(value.replace(",", ""))
            except (AttributeError, ValueError):
                pass
    return [found[key] for key in sorted(found)]


def floor_clocks(kernel, shape):
    """Clocks of one multiprocessor, had it all work: of the tensor cores or the exponentials."""
    sizes = shape.removesuffix(",causal").split(",")
    batch, heads, length, head_dim = (int(size.split("/")[0]) for size in sizes)
    scores = batch * heads * length**2 / (2 if shape.endswith(",causal") else 1)
    qk = 8 if "_int8_" in kernel else 16
    pv = 8 if "_fp8_" in kernel else 16
    tensor = scores * head_dim * (1 / MULTIPLY_ADDS[qk] + 1 / MULTIPLY_ADDS[pv])
    return max(tensor, scores / EXPONENTIALS)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--schemes", required=True, help="names of presets, or auto, with commas")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="as bench_gpu takes them")
    parser.add_argument("--log", help="file to keep ncu's table in")
    options = parser.parse_args()
    ncu = find_ncu()
    columns = chosen(known_metrics(ncu))
    log = options.log or os.path.join(tempfile.mkdtemp(), "ncu.csv")
    metrics = [TIME, CLOCKS, CLOCK, *columns.values()]
    command = [ncu, "--clock-control", "none", "--csv", "--print-units", "base", "--log-file", log,
               "--metrics", ",".join(metrics), options.binary, "--launch", options.schemes, *options.shapes]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    calls = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    for call in calls:
        if "error" in call:
            print(f"{call['scheme']} on {call['shape']} left out: {call['error']}")
    if result.returncode:
        print(f"ncu ended with status {result.returncode}; what it measured until then:")
    measured = iter(launches(log))

    print(f"\n{'kernel':<72}{'µs':>8}{'GHz':>6}" + "".join(f"{column:>8}" for column in columns) + f"{'floor':>8}")
    for call in calls:
        if "error" in call:
            continue
        print(f"{call['shape']}  {call['scheme']}")
        for kernel in call["kernels"]:
            name, values = next(measured, (None, {}))
            if name is None or kernel["kernel"] not in name:
                exit(f"the launch is of {name}, expected {kernel['kernel']}")
            clock, time = values.get(CLOCK, 0), values.get(TIME, 0)
            cells = "".join(f"{values[m]:>7.0f}%" if m in values else f"{'-':>8}" for m in columns.values())
            floor = ""
            if name.startswith("attention") and clock and CLOCKS in values:
                # Clocks of all multiprocessors over time and clock are their number.
                multiprocessors = values[CLOCKS] / (clock * time * 1e-9)
                floor = f"{time * 1e-9 * clock * round(multiprocessors) / floor_clocks(name, call['shape']):.2f}×"
            print(f"  {name[:69]:<70}{time / 1e3:>8.1f}{clock / 1e9:>6.2f}{cells}{floor:>8}")


if __name__ == "__main__":
    main()
