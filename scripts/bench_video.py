"""End-to-end time of a video transformer's blocks with our attention beside PyTorch's, in one run.

    python3 scripts/bench_video.py [--heads 24,40] [--tokens 17776] [--blocks 4] [--rounds 3]

Blocks as Wan's and CogVideoX's have them, randomly initialised, bf16: self-attention with normalised and rotated
queries and keys, cross-attention to 226 tokens of text, a feed-forward of 2.7 times the width, all modulated by the
time step. Contestants take turns; each runs the same blocks, whose attention looks up
`torch.nn.functional.scaled_dot_product_attention`: PyTorch's with cuDNN or FlashAttention-2, or ours through
`sageattention.patch()`. The attention part is the time of the self-attention calls, by events around them.

Needs a CUDA GPU, torch and the wheel of this repository.
"""

import argparse
import statistics
import subprocess
import sys

import sageattention
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

TEXT_TOKENS = 226
HEAD_DIM = 128
CONTESTANTS = {
    "cuDNN": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
    "FlashAttention-2": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "ours": lambda: sageattention.patched(),
    "ours, FP8": lambda: sageattention.patched("sage2-int8-fp8-per-thread"),
}


class Clock:
    """Events around the self-attention of a pass."""

    def __init__(self):
        self.pairs = []

    def around(self, run):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = run()
        end.record()
        self.pairs.append((start, end))
        return result

    def take_ms(self):
        total = sum(start.elapsed_time(end) for start, end in self.pairs)
        self.pairs.clear()
        return total


class Attention(nn.Module):
    def __init__(self, heads, clock=None):
        super().__init__()
        width = heads * HEAD_DIM
        self.heads, self.clock = heads, clock
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x, context, rotation=None):
        split = lambda y: y.unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2)
        q, k, v = split(self.norm_q(self.q(x))), split(self.norm_k(self.k(context))), split(self.v(context))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        run = lambda: F.scaled_dot_product_attention(q, k, v)
        out = run() if self.clock is None else self.clock.around(run)
        return self.out(out.transpose(1, 2).flatten(2))


def rotate(x, rotation):
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, heads, clock):
        super().__init__()
        width = heads * HEAD_DIM
        self.norm1, self.norm3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(width)
        self.own, self.cross = Attention(heads, clock), Attention(heads)
        hidden = round(2.7 * width / 128) * 128
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x, text, rotation):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.own(y, y, rotation)
        x = x + self.cross(self.norm2(x), text)
        return x + gate2 * self.feed(self.norm3(x) * (1 + scale2) + shift2)


def passes_ms(blocks, clock, inputs, contestant, passes):
    """Milliseconds of the whole and of the attention part, for each pass, and the last output."""
    x, text, rotation = inputs
    times = []
    with contestant():
        for index in range(passes + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            y = x
            for block in blocks:
                y = block(y, text, rotation)
            end.record()
            end.synchronize()
            attention = clock.take_ms()
            if index > 0:
                times.append((start.elapsed_time(end), attention))
    return times, y


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", default="24,40")
    parser.add_argument("--tokens", type=int, default=17776)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--passes", type=int, default=3, help="timed passes of a turn, after one that is not")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_video: torch finds no CUDA GPU")

    program = "import time; t = time.perf_counter(); import sageattention; print(time.perf_counter() - t)"
    imports = [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(3)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"import of sageattention: {min(imports) * 1e3:.0f} ms")
    for heads in map(int, options.heads.split(",")):
        measure(heads, options)


@torch.inference_mode()
def measure(heads, options):
    torch.manual_seed(0)
    clock = Clock()
    with torch.device("cuda"):
        blocks = [Block(heads, clock).to(torch.bfloat16).eval() for _ in range(options.blocks)]
        width = heads * HEAD_DIM
        x = torch.randn(1, options.tokens, width, dtype=torch.bfloat16)
        text = torch.randn(1, TEXT_TOKENS, width, dtype=torch.bfloat16)
        angles = torch.arange(options.tokens)[:, None] * 10000 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        rotation = (angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16))
    print(f"\n{options.tokens} tokens, {heads} heads of {HEAD_DIM}, {options.blocks} blocks, bf16, batch 1")
    samples, outputs = {}, {}
    for _ in range(options.rounds):
        for name, contestant in CONTESTANTS.items():
            if samples.setdefault(name, []) is None:
                continue
            try:
                sageattention.counts(reset=True)
                times, outputs[name] = passes_ms(blocks, clock, (x, text, rotation), contestant, options.passes)
            except (RuntimeError, NotImplementedError) as error:
                print(f"{name} left out: {str(error).splitlines()[0]}")
                samples[name] = None
                clock.pairs.clear()
                continue
            if name.startswith("ours") and sageattention.counts().fallbacks:
                sys.exit(f"bench_video: {name} fell back: {sageattention.counts()}")
            samples[name].extend(times)
    medians = {
        name: tuple(statistics.median(part) for part in zip(*times)) for name, times in samples.items() if times
    }  # fmt: skip
    print(
        f"{'':<18}{'whole ms':>10}{'attention ms':>14}"
        + "".join(f"{'vs ' + peer:>30}" for peer in list(CONTESTANTS)[:2])
    )
    exact = outputs.get("FlashAttention-2")
    for name, (whole, attention) in medians.items():
        cells = ""
        for peer in list(CONTESTANTS)[:2]:
            if peer in medians:
                ratio = f"{medians[peer][0] / whole:.2f}x whole, {medians[peer][1] / attention:.2f}x attention"
                cells += f"{ratio:>30}"
        if exact is not None and name != "FlashAttention-2":
            change = ((outputs[name] - exact).abs().sum() / (exact - x).abs().sum()).item()
            cells += f"   output differs by {change:.4f}"
        print(f"{name:<18}{whole:>10.1f}{attention:>14.1f}{cells}")


if __name__ == "__main__":
    main()
