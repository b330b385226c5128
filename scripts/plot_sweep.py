"""Draws a record of `scripts/sweep_gpu.py`: each shape's speed beside the fastest 16-bit peer, family by family.

    python3 scripts/plot_sweep.py benches/record/2026-12-01-h200-sweep.json docs/performance/data/sweep-h200.svg

A dot is a shape, at the peer's time over ours, the median over the rounds; a bar is a family's geometric mean. Needs
matplotlib.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

OURS = "auto"
PEERS = {"FA2", "FA3", "FA4", "cuDNN", "efficient"}
COLOURS = {"faster": "#1a7f5a", "slower": "#b5542c"}


def ratio(shape):
    """The fastest peer's time over ours, of medians over the rounds; none where either is missing."""
    names = set().union(*shape["rounds"])
    medians = {name: statistics.median(times[name] for times in shape["rounds"] if name in times) for name in names}
    ours = medians.pop(OURS, None)
    peers = [ms for name, ms in medians.items() if name in PEERS]
    return min(peers) / ours if ours and peers else None


def families(record):
    """Ratios of each family, in the order in which the record has them."""
    found = {}
    for shape in record["shapes"]:
        if value := ratio(shape):
            found.setdefault(shape["family"], []).append(value)
    return found


def draw(record, path):
    matplotlib.rcParams.update({"svg.hashsalt": "sweep", "svg.fonttype": "none", "font.size": 10})
    found = families(record)
    figure, axes = plt.subplots(figsize=(7.5, 0.42 * len(found) + 1.1), layout="constrained")
    for row, values in enumerate(found.values()):
        for place, value in enumerate(sorted(values)):
            # Dots that would hide each other lie below and above their row.
            height = row + (place % 5 - 2) * 0.12
            colour = COLOURS["faster" if value >= 1 else "slower"]
            axes.plot(value, height, "o", markersize=3.5, color=colour, alpha=0.75)
        mean = math.exp(statistics.fmean(map(math.log, values)))
        axes.plot([mean, mean], [row - 0.36, row + 0.36], color="black", linewidth=1.5)
        axes.annotate(f"{mean:.2f}", (mean, row - 0.38), ha="center", va="bottom", fontsize=8)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    labels = [f"{family} ({len(values)})" for family, values in found.items()]
    axes.set_yticks(range(len(found)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the fastest 16-bit peer")
    axes.set_title(f"{record['gpu']}, bf16, GPU time in CUDA graphs", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.record.read_text()), options.picture)


if __name__ == "__main__":
    main()
