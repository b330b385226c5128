"""How far our schemes are from exact attention on a GPU, beside what 16-bit attention loses.

    python3 scripts/accuracy_gpu.py PATH_OF_sageattn --schemes auto,full [--length 4096] [--heads 4]

Inputs, f16: N(0, 1); the same with an offset of N(0, 10) on each channel of K, and of N(0, 1) on each channel of V; and
real ones, the layers of MiniLM that `sageattn` shows. `sageattn run` computes them on the GPU; exact attention is of
the same numbers in double precision, also there. FA2 is PyTorch's FlashAttention-2 in f16. Each cell: cosine, relative
L1 (Σ|a − e| / Σ|e|), root mean square error. Needs torch and safetensors.
"""

import argparse
import pathlib
import subprocess
import tempfile

import torch
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

REAL = pathlib.Path(__file__).parent.parent / "crates/cli/data/minilm_qkv.safetensors"
DEVICE = "cuda"


def made_up(length, heads):
    """Tensors by `prefix + q, k or v`."""
    tensors = {}
    for head_dim in (64, 128):
        generator = torch.Generator().manual_seed(head_dim)
        normal = lambda *shape: torch.randn(*shape, generator=generator)
        q, k, v = (normal(1, heads, length, head_dim) for _ in range(3))
        offset = normal(1, heads, 1, head_dim)
        sets = {"N(0,1)": (q, k, v), "K offset": (q, k + 10 * offset, v), "V offset": (q, k, v + offset)}
        for name, set_of_three in sets.items():
            for letter, x in zip("qkv", set_of_three):
                tensors[f"D{head_dim} {name}.{letter}"] = x.half().contiguous()
    return tensors


def exact(q, k, v, causal):
    """Attention in double precision, a head at a time to bound memory."""
    q, k, v = (x.to(DEVICE).double() for x in (q, k, v))
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = q[b, h] @ k[b, h].T * q.shape[-1] ** -0.5
            if causal:
                hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
                scores.masked_fill_(hidden, float("-inf"))
            out[b, h] = scores.softmax(-1) @ v[b, h]
    return out


def flash_attention(q, k, v, causal):
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def distance(out, expected):
    out, expected = out.to(DEVICE).double().flatten(), expected.flatten()
    error = out - expected
    cosine = torch.nn.functional.cosine_similarity(out, expected, dim=0).item()
    relative = (error.abs().sum() / expected.abs().sum()).item()
    return f"{cosine:.6f} {relative:.5f} {error.square().mean().sqrt().item():.1e}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--schemes", required=True, help="names of presets, or auto, with commas")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    options = parser.parse_args()
    tensors = made_up(options.length, options.heads)
    real = load_file(REAL)
    shape = list(next(iter(real.values())).shape)
    tensors |= {f"MiniLM {name}": x for name, x in real.items()}
    prefixes = sorted({name[:-1] for name in tensors})
    three = lambda prefix: (tensors[f"{prefix}{letter}"] for letter in "qkv")
    print(f"made up: {[1, options.heads, options.length]}, MiniLM: {shape}; cosine, relative L1, RMSE")
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = f"{folder}/qkv.safetensors", f"{folder}/out.safetensors"
        save_file(tensors, inputs)
        for causal in (False, True):
            expected = {p: exact(*three(p), causal) for p in prefixes}
            columns = {}
            for scheme in options.schemes.split(","):
                command = [options.binary, "run", inputs, "-o", outputs, "--device", "cuda:0", "--scheme", scheme]
                result = subprocess.run(command + ["--causal"] * causal, capture_output=True, text=True)
                if result.returncode:
                    print(f"{scheme} left out: {result.stderr.strip()[:200]}")
                    continue
                columns[scheme] = {name[:-3]: x for name, x in load_file(outputs).items() if name.endswith("out")}
            columns["FA2"] = {p: flash_attention(*three(p), causal) for p in prefixes}
            print(f"\n{'causal' if causal else 'not causal':<16}" + "".join(f"{c:>30}" for c in columns))
            for p in prefixes:
                cells = "".join(f"{distance(column[p], expected[p]):>30}" for column in columns.values())
                print(f"{p.rstrip('.'):<16}{cells}", flush=True)


if __name__ == "__main__":
    main()
