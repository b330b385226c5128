#!/usr/bin/env python3
"""Prints the tables of predicted times of docs/performance/gpus.md: every GPU that `sageattn explain --gpu` knows.

    cargo build --release -p sageattn
    scripts/predicted_times.py target/release/sageattn

Half a minute. Run it after a change to a kernel, or to what a prediction is made of.
"""

import json
import re
import subprocess
import sys

SHAPES = {
    "Video, B1 H24 S 17,776 D 128": ["--heads", "24", "--seq", "17776"],
    "Image, B1 H24 S 4608 D 128": ["--heads", "24", "--seq", "4608"],
    "Prefill, B1 H32/8 S 8192 D 128 causal": ["--heads", "32", "--kv-heads", "8", "--seq", "8192", "--causal"],
}

# Each column's name, and the scores and values of the schemes that are its.
COLUMNS = {
    "full, ms": r"full QK",
    "INT8 + 16 bits": r"INT8 QK.* (FP16|BF16) PV",
    "8-bit values": r"INT8 QK.* FP8 PV",
    "`nvfp4-fp8`": r"NVFP4 QK.* FP8 PV",
    "`sage3-nvfp4`": r"NVFP4 QK.* NVFP4 PV",
}

# bf16 is what models are in; the first of these GPUs have no tensor cores for it.
WITHOUT_BF16 = {"t4", "rtx-2080-ti"}


def explain(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, "explain", *arguments], capture_output=True, text=True, check=False)


def gpus(program: str) -> list[str]:
    """The names, from what the command says of one that is none."""
    refusal = explain(program, "--heads", "1", "--seq", "1", "--gpu", "none").stderr
    names = re.search(r"expected one of (.*?) \(", refusal)
    if names is None:
        sys.exit(f"{program} explain does not name its GPUs: {refusal}")
    return names[1].split(", ")


def row(program: str, gpu: str, shape: list[str]) -> list[str]:
    dtype = "f16" if gpu in WITHOUT_BF16 else "bf16"
    run = explain(program, *shape, "--head-dim", "128", "--dtype", dtype, "--gpu", gpu, "--json")
    if run.returncode:
        sys.exit(run.stderr)
    predictions = {each["scheme"]: each["predicted_ms"] for each in json.loads(run.stdout)["predictions"]}
    times = [
        next((ms for name, ms in predictions.items() if re.match(scheme, name)), None) for scheme in COLUMNS.values()
    ]
    full = times[0]
    if full is None:
        sys.exit(f"{gpu}: no time of full precision among {predictions}")
    return [gpu, f"{full:.3g}", *("–" if ms is None else f"{full / ms:.2f}×" for ms in times[1:])]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    program = sys.argv[1]
    for title, shape in SHAPES.items():
        print(f"\n**{title}**\n")
        print(f"| GPU | {' | '.join(COLUMNS)} |")
        print("| --- |" + " --: |" * len(COLUMNS))
        for gpu in gpus(program):
            print(f"| {' | '.join(row(program, gpu, shape))} |")


if __name__ == "__main__":
    main()
