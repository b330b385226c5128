#!/usr/bin/env python3
"""Fits the planner's constants, crates/kernels/src/tuning/costs.rs, to measured times, and prints them beside those that
are there.

    cargo build -p sageattn
    scripts/fit_costs.py target/debug/sageattn benches/record/2026-12-01-h200-alternatives.json

The record has, for each shape, the milliseconds of every way that the planner weighs, as `bench_gpu --alternatives` prints
them. The model is that of crates/kernels/src/forward/predicted.rs, for calls without explicit masks; before it fits, the
script holds its own predictions beside those that `sageattn explain` prints, and stops where they differ. Constants of
kernels that the record does not have stay as they are. Needs numpy and scipy.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

from scipy.optimize import least_squares

COSTS = Path(__file__).parent.parent / "crates/kernels/src/tuning/costs.rs"

# As in predicted.rs, in microseconds and bytes a microsecond.
LAUNCH, PREPARING_KEYS, PREPARING_VALUES, MERGING_LAUNCH = 1.6, 3.4, 6.3, 3.2
BANDWIDTH, PREPARING, MERGING, UNEVEN, RAGGED_TILE = 4.2e6, 1.05, 2.7, 0.23, 0.55
GROUP_ROWS = KEY_TILE = 64
MULTIPROCESSORS = 132

# By how much of a time the predictions of both may differ, whose constants are rounded for printing.
SAME = 0.01


def tiles(count, size):
    return -(-count // size)


@dataclass(frozen=True)
class Kernel:
    """What has constants of its own: a row of the table in costs.rs."""

    integer: bool
    fp8: bool
    dim: int
    # Warpgroups of 64 query rows, "long" with tiles of 128 keys, or "warps" of `mma.sync`.
    engine: str


@dataclass(frozen=True)
class Call:
    """A shape as `bench_gpu` writes it."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    dim: int
    value_dim: int
    causal: bool

    @staticmethod
    def parse(shape):
        parts = shape.split(",")
        heads, lengths, dims = ([int(x) for x in re.split("[x/]", part)] for part in parts[1:4])
        return Call(
            int(parts[0]), heads[0], heads[-1], lengths[0], lengths[-1], dims[0], dims[-1], parts[-1] == "causal"
        )

    def padded_dim(self):
        return next(dim for dim in (64, 128, 192 if self.dim == 192 else 256) if self.dim <= dim)


@dataclass(frozen=True)
class Way:
    """A call, and how it is computed."""

    call: Call
    computed: str
    tiling: str
    splits: int

    def kernel(self):
        """Whose constants count; none where there are none."""
        found = re.match(r"(wg?)(\d+)x16x(\d+)x", self.tiling)
        if not found:
            return None
        keys = int(found[3])
        engine = "warps" if found[1] == "w" else "long" if keys == 128 else int(found[2]) // 4
        latent = (self.call.dim, self.call.value_dim) == (192, 128)
        return Kernel(
            "INT8" in self.computed, "FP8 PV" in self.computed, 192 if latent else self.call.padded_dim(), str(engine)
        )

    def resident(self):
        """Blocks of a multiprocessor."""
        return int(re.search(r"_b(\d)", self.tiling)[1])

    def block(self):
        """Query rows of a block and keys of a tile."""
        warps, keys = re.match(r"wg?(\d+)x16x(\d+)x", self.tiling).groups()
        return 16 * int(warps), int(keys)

    def around(self):
        """Microseconds of all launches but attention."""
        call = self.call
        rows = call.batch * call.kv_heads * call.kv_len
        time = LAUNCH
        if "INT8" in self.computed:
            time += PREPARING_KEYS + PREPARING * 3 * rows * call.dim / BANDWIDTH
        if "FP8 PV" in self.computed:
            time += PREPARING_VALUES + PREPARING * 3 * rows * call.value_dim / BANDWIDTH
        if self.splits > 1:
            outputs = self.splits * call.batch * call.heads * call.q_len * call.value_dim
            time += MERGING_LAUNCH + MERGING * 8 * outputs / BANDWIDTH
        return time

    def attention(self, piece, tile, channels, alone):
        """Microseconds of the attention kernel, by its constants."""
        call = self.call
        block_q, tile_keys = self.block()
        pieces = call.batch * call.heads * tiles(call.q_len, block_q) * self.splits
        slots = MULTIPROCESSORS * self.resident()
        part = alone if pieces <= MULTIPROCESSORS else 1.0
        tile *= 1 - channels * (1 - 16 * tiles(call.dim, 16) / call.padded_dim())
        if self.tiling.startswith("wg") and "FP8 PV" not in self.computed and 2 * call.value_dim % 64:
            tile = max(tile, RAGGED_TILE * self.resident())
        of_tiles = lambda count: part * (piece + tile * max(count / self.splits, 1))
        if not call.causal:
            return tiles(pieces, slots) * of_tiles(tiles(call.kv_len, tile_keys) * tile_keys / KEY_TILE)
        seen = lambda row: tiles(min(call.kv_len, row + GROUP_ROWS + call.kv_len - call.q_len), KEY_TILE)
        times = []
        for first in range(0, call.q_len, block_q):
            groups = range(first, min(first + block_q, call.q_len), GROUP_ROWS)
            times.append(of_tiles(sum(map(seen, groups)) * GROUP_ROWS / block_q))
        if pieces <= slots:
            return max(times)
        return call.batch * call.heads * self.splits * sum(times) / slots + UNEVEN * max(times)

    def microseconds(self, constants):
        call = self.call
        piece, tile = constants.kernels[self.kernel()]
        alone = {"1": constants.alone[0], "warps": constants.alone[1]}.get(self.kernel().engine, 1.0)
        rows = call.heads * call.q_len + call.kv_heads * call.kv_len
        moved = 2 * call.batch * rows * (call.dim + call.value_dim) / BANDWIDTH
        time = self.attention(piece, tile, constants.channels[self.kernel().dim], alone)
        return self.around() + max(time, moved)


@dataclass
class Constants:
    """Microseconds of a piece and of a tile, by kernel, and the parts that scale them."""

    kernels: dict
    channels: dict
    alone: tuple

    @staticmethod
    def read(text):
        """Those of costs.rs."""
        kernels = {}
        row = r"\((true|false), (true|false), (\d+)(?:, (\d))?\) => (?:Some\()?\(([\d.]+), ([\d.]+)\)"
        places = {"long": text.index("fn of_long_tiles"), "warps": text.index("fn of_warps(")}
        for found in re.finditer(row, text):
            engine = found[4] or max((at, name) for name, at in places.items() if at < found.start())[1]
            kernel = Kernel(found[1] == "true", found[2] == "true", int(found[3]), engine)
            kernels[kernel] = (float(found[5]), float(found[6]))
        channels = re.search(r"let channels = match.*?\};", text, re.DOTALL)[0]
        by_dim = {int(dim): float(part) for dim, part in re.findall(r"(\d+) => ([\d.]+)", channels)}
        by_dim[256] = float(re.search(r"_ => ([\d.]+)", channels)[1])
        one_group = re.search(r"of_warpgroups\(key, 1\)\?, ([\d.]+)\)", text)[1]
        of_warps = re.search(r"of_warps\(key\)\?, ([\d.]+)\)", text)[1]
        return Constants(kernels, by_dim, (float(one_group), float(of_warps)))

    def numbers(self, kernels):
        return [x for kernel in kernels for x in self.kernels[kernel]] + [*self.channels.values(), *self.alone]

    def with_numbers(self, kernels, numbers):
        pairs = dict(zip(kernels, zip(numbers[0::2], numbers[1::2])))
        rest = list(numbers[2 * len(kernels) :])
        channels = dict(zip(self.channels, rest))
        return Constants(self.kernels | pairs, channels, tuple(rest[len(channels) :]))


def printed(program, call):
    """What `sageattn explain` predicts: microseconds by scheme, tile shape and parts of the keys."""
    arguments = ["--batch", call.batch, "--heads", call.heads, "--kv-heads", call.kv_heads, "--seq", call.q_len]
    arguments += ["--kv-len", call.kv_len, "--head-dim", call.dim, "--value-dim", call.value_dim, "--dtype", "bf16"]
    command = [program, "explain", "--target", "sm_90a", *map(str, arguments), *(["--causal"] * call.causal)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^  (\S.*?)  +(\S+) +(\d+) +([\d.]+)", text, re.MULTILINE)
    return {(computed, tiling, int(splits)): float(time) for computed, tiling, splits, time in rows}


def check(program, ways, constants):
    """Stops where the model is another than the planner's."""
    compared = 0
    for call in dict.fromkeys(way.call for way in ways):
        predictions = printed(program, call)
        for way in (way for way in ways if way.call == call):
            theirs = predictions.get((way.computed, way.tiling, way.splits))
            own = way.microseconds(constants)
            compared += theirs is not None
            if theirs is not None and abs(own - theirs) > SAME * theirs + 0.1:
                raise SystemExit(f"{way}: predicted here {own:.1f} µs, by {program} {theirs:.1f}: the models differ")
    print(f"{compared} of {len(ways)} predictions are {program}'s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="the command sageattn")
    parser.add_argument("record", help="times of alternatives")
    options = parser.parse_args()
    constants = Constants.read(COSTS.read_text())
    measured = {}
    for shape in json.loads(Path(options.record).read_text())["shapes"]:
        for row in shape["alternatives"]:
            way = Way(Call.parse(shape["shape"]), row["computed"], row["tiling"], row["splits"])
            if way.kernel() in constants.kernels:
                measured[way] = 1e3 * statistics.fmean(row["ms"])
    check(options.program, list(measured), constants)

    kernels = list(dict.fromkeys(way.kernel() for way in measured))
    begin = constants.numbers(kernels)

    def residuals(numbers):
        tried = constants.with_numbers(kernels, numbers)
        errors = [math.log(way.microseconds(tried) / time) for way, time in measured.items()]
        # What the record says little of stays near where it was.
        return errors + [0.02 * (number / first - 1) if first else number for number, first in zip(numbers, begin)]

    most = [20.0] * 2 * len(kernels) + [0.9] * len(constants.channels) + [1.0] * len(constants.alone)
    fit = least_squares(residuals, begin, loss="soft_l1", f_scale=0.08, bounds=([0.0] * len(begin), most))
    fitted = constants.with_numbers(kernels, fit.x)
    for kernel in sorted(kernels, key=lambda kernel: (kernel.integer, kernel.fp8, kernel.dim, kernel.engine)):
        before, after = constants.kernels[kernel], fitted.kernels[kernel]
        count = sum(way.kernel() == kernel for way in measured)
        print(f"{kernel!s:<70} {before[0]:4.1f} {before[1]:.2f} -> {after[0]:4.1f} {after[1]:.2f}  of {count} times")
    for dim, part in fitted.channels.items():
        print(f"channels of {dim}: {constants.channels[dim]:.2f} -> {part:.2f}")
    print(f"alone: {constants.alone} -> {tuple(round(float(part), 2) for part in fitted.alone)}")
    for title, these in (("before", constants), ("fitted", fitted)):
        errors = [math.log(way.microseconds(these) / time) for way, time in measured.items()]
        print(f"{title}: root mean square of errors {math.sqrt(statistics.fmean(e * e for e in errors)):.1%}")


if __name__ == "__main__":
    main()
