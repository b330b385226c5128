#!/usr/bin/env python3
"""What FP4 does to a diffusion process, step by step, and what a hybrid schedule gets back.

    pip install numpy scikit-learn sageattention
    python scripts/hybrid_diffusion.py [--steps 50] [--samples 512] [--json FILE]

The process is a real one that needs no trained network: for data x_1 … x_n, here scikit-learn's 1,797 handwritten
digits of 8 × 8 pixels, the best possible denoiser is known, and it is attention. With noise of variance σ² on √ᾱ·x, the
mean of x given a noisy image y is softmax((√ᾱ·⟨y, x_i⟩ − ᾱ·|x_i|²/2) / σ²) over the x_i: queries y, keys and values
x_i, a bias for each key. DDIM without fresh noise follows it from noise to a digit.

Each schedule starts from the same noise. Printed is how far its images are from those of full precision (relative L1),
and how many end at another digit.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from sageattention import HybridSchedule
from sklearn.datasets import load_digits


def data():
    """The digits `[n, 64]`, with mean 0 and variance 1 all together."""
    images = load_digits().data.astype(np.float32)
    images -= images.mean(axis=0)
    return images / images.std()


def sample(images, noise, schedule):
    """Images from noise by DDIM, with the cosine schedule of ᾱ."""
    steps = schedule.steps
    at = np.cos(np.linspace(0.98, 0.02, steps + 1) * np.pi / 2) ** 2
    keys = images[None, None]
    squares = (images**2).sum(axis=1)
    y = noise.copy()
    for step, (now, then) in enumerate(zip(at, at[1:])):
        variance = 1 - now
        bias = (-now / (2 * variance) * squares).astype(np.float32).reshape(1, 1, 1, -1)
        clean = schedule(y[None, None], keys, keys, sm_scale=float(np.sqrt(now) / variance), attn_mask=bias)[0, 0]
        direction = (y - np.sqrt(now) * clean) / np.sqrt(variance)
        y = (np.sqrt(then) * clean + np.sqrt(1 - then) * direction).astype(np.float32)
        schedule.step()
    return y


def nearest(images, samples):
    """The digit that each sample is nearest to."""
    distances = (images**2).sum(axis=1)[None] - 2 * samples @ images.T
    return distances.argmin(axis=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    images = data()
    noise = np.random.default_rng(0).standard_normal((given.samples, images.shape[1]), dtype=np.float32)
    exact = sample(images, noise, HybridSchedule(given.steps, first=0, last=0, inner="full"))
    ends = nearest(images, exact)
    tenth, third = given.steps // 10, given.steps // 3
    rows = []
    for inner in ("int8-per-token", "nvfp4-fp8", "sage3-nvfp4", "sage3-nvfp4-one-level", "sage3-mxfp4"):
        outside = [(0, 0)] if inner == "int8-per-token" else [(0, 0), (tenth, tenth), (third, 0), (0, third), (third, third)]
        for first, last in outside:
            schedule = HybridSchedule(given.steps, first=first, last=last, outer="int8-per-token", inner=inner)
            found = sample(images, noise, schedule)
            rows.append(
                {
                    "inner": inner,
                    "first": first,
                    "last": last,
                    "relative_l1": float(np.abs(found - exact).sum() / np.abs(exact).sum()),
                    "other_digit": float((nearest(images, found) != ends).mean()),
                }
            )
    print(f"{given.samples} samples, {given.steps} steps, {len(images)} keys, head_dim {images.shape[1]}")
    print(f"{'inner scheme':24} {'8-bit steps':>12} {'relative L1':>12} {'another digit':>14}")
    for row in rows:
        outer = f"{row['first']} + {row['last']}"
        print(f"{row['inner']:24} {outer:>12} {row['relative_l1']:12.4f} {row['other_digit']:14.1%}")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
