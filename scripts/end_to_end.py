"""Time of models with our attention beside PyTorch's, in one run: of attention, and of the whole.

    python3 scripts/end_to_end.py [--only wan,flux,qwen,decoder] [--rounds 2] [--json FILE] [--device cuda]

Real widths, random weights, bf16: two blocks of Wan 2.2's 14B model at 720p (75,600 tokens), blocks of FLUX.1 (4,608
tokens) and of Qwen-Image (4,096 tokens and 512 of text, a mask over the latter, two prompts), all through diffusers; and
a decoder as SmolLM2-1.7B and as Llama-3-8B have them, prompt and generation through transformers.

Contestants take turns and run the same modules: PyTorch's function with cuDNN and with FlashAttention-2 where that takes
the call, and ours by `sageattention.patch()`, with the device's own choice and with FP8. Attention's time is that of the
calls to torch's function, by events around them. `--device cpu` runs tiny ones, to see that the program does.
"""

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import sageattention
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# A mask has no FlashAttention-2, and torch's own choice is what users have: cuDNN or FlashAttention-2, else another.
CONTESTANTS = {
    "cuDNN": lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION]),
    "FlashAttention-2": lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
    "torch's choice": contextlib.nullcontext,
    "ours": lambda: sageattention.patched(),
    "ours, FP8": lambda: sageattention.patched("int8-fp8"),
}
OURS = [name for name in CONTESTANTS if name.startswith("ours")]


class Clock:
    """Time around each call to torch's function, whoever stands in for it."""

    def __init__(self, device):
        self.device, self.pairs = device, []

    def event(self):
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_ms(self, start, end):
        if self.device == "cpu":
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)

    @contextlib.contextmanager
    def on_attention(self):
        function = F.scaled_dot_product_attention

        def timed(*args, **kwargs):
            start = self.event()
            out = function(*args, **kwargs)
            self.pairs.append((start, self.event()))
            return out

        F.scaled_dot_product_attention = timed
        try:
            yield
        finally:
            F.scaled_dot_product_attention = function

    def take_ms(self):
        total = sum(self.between_ms(*pair) for pair in self.pairs)
        self.pairs.clear()
        return total


def built(make, device):
    torch.manual_seed(0)
    with torch.device(device):
        return make().to(torch.bfloat16).eval()


def normal(device, *shape):
    return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=torch.Generator(device).manual_seed(1))


def wan(device, large):
    from diffusers import WanTransformer3DModel

    heads, ffn, text, size = (40, 13824, 4096, (21, 90, 160)) if large else (2, 256, 64, (3, 16, 16))
    model = built(
        lambda: WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, text_dim=text, num_layers=2), device
    )
    inputs = dict(
        hidden_states=normal(device, 1, 16, *size),
        timestep=torch.tensor([500], device=device),
        encoder_hidden_states=normal(device, 1, 512 if large else 20, text),
        return_dict=False,
    )
    tokens = size[0] * size[1] * size[2] // 4
    yield f"Wan 2.2, 2 blocks, {tokens} tokens", lambda: model(**inputs)[0]


def flux(device, large):
    from diffusers import FluxTransformer2DModel

    heads, text, tokens, layers = (24, 4096, 4096, (2, 4)) if large else (2, 64, 144, (1, 1))
    model = built(
        lambda: FluxTransformer2DModel(
            num_layers=layers[0], num_single_layers=layers[1], num_attention_heads=heads, joint_attention_dim=text,
        ),
        device,
    )  # fmt: skip
    words = 512 if large else 20
    inputs = dict(
        hidden_states=normal(device, 1, tokens, 64),
        encoder_hidden_states=normal(device, 1, words, text),
        pooled_projections=normal(device, 1, 768),
        timestep=torch.tensor([0.5], device=device, dtype=torch.bfloat16),
        img_ids=torch.zeros(tokens, 3, device=device),
        txt_ids=torch.zeros(words, 3, device=device),
        return_dict=False,
    )
    yield f"FLUX.1, {layers[0]} + {layers[1]} blocks, {tokens + words} tokens", lambda: model(**inputs)[0]


def qwen(device, large):
    from diffusers import QwenImageTransformer2DModel

    heads, text, side, layers, words = (24, 3584, 64, 4, 512) if large else (2, 64, 12, 1, 20)
    model = built(
        lambda: QwenImageTransformer2DModel(num_layers=layers, num_attention_heads=heads, joint_attention_dim=text), device
    )
    mask = torch.ones(2, words, dtype=torch.long, device=device)
    mask[1, words // 8 :] = 0
    inputs = dict(
        hidden_states=normal(device, 2, side * side, 64),
        encoder_hidden_states=normal(device, 2, words, text),
        encoder_hidden_states_mask=mask,
        timestep=torch.tensor([0.5, 0.5], device=device, dtype=torch.bfloat16),
        img_shapes=[[(1, side, side)]] * 2,
        return_dict=False,
    )
    yield f"Qwen-Image, {layers} blocks, 2 x {side * side} + {words} masked", lambda: model(**inputs)[0]


def decoder(device, large):
    from transformers import LlamaConfig, LlamaForCausalLM

    shapes = {
        # hidden, feed-forward, heads, key heads, layers, prompt, tokens generated
        "SmolLM2-1.7B": (2048, 8192, 32, 32, 4, 8192, 16) if large else (128, 256, 2, 2, 1, 200, 2),
        "Llama-3-8B": (4096, 14336, 32, 8, 4, 16384, 16) if large else (128, 256, 2, 1, 1, 200, 2),
    }
    for name, (hidden, feed, heads, key_heads, layers, prompt, new) in shapes.items():
        config = LlamaConfig(
            vocab_size=32000, hidden_size=hidden, intermediate_size=feed, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=key_heads, max_position_embeddings=65536,
            attn_implementation="sdpa",
        )  # fmt: skip
        model = built(lambda: LlamaForCausalLM(config), device)
        ids = torch.randint(0, 32000, (1, prompt), device=device)
        yield f"{name}, {layers} layers, prompt of {prompt}", lambda: model(ids, logits_to_keep=1).logits
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

        def generate():
            # Tokens that are given, so that all contestants do the same.
            for token in range(new):
                logits = model(ids[:, token : token + 1], past_key_values=cache, use_cache=True).logits
            cache.crop(-new)
            return logits

        yield f"{name}, {layers} layers, {new} tokens after {prompt}", generate


MODELS = {"wan": (wan, "diffusers"), "flux": (flux, "diffusers"), "qwen": (qwen, "diffusers"), "decoder": (decoder, "transformers")}


def measure(what, run, clock, rounds, passes):
    """A row for each contestant: medians over all passes, and how far its output is from torch's own."""
    samples, outputs, left_out = {}, {}, {}
    for turn in range(rounds):
        for name in CONTESTANTS if turn % 2 == 0 else reversed(CONTESTANTS):
            if name in left_out:
                continue
            sageattention.counts(reset=True)
            try:
                with CONTESTANTS[name](), clock.on_attention():
                    for attempt in range(passes + 1):
                        start = clock.event()
                        outputs[name] = run()
                        whole = clock.between_ms(start, clock.event())
                        attention = clock.take_ms()
                        # The first pass of a turn compiles, and is not counted.
                        if attempt:
                            samples.setdefault(name, []).append((whole, attention))
            except (RuntimeError, NotImplementedError) as error:
                clock.pairs.clear()
                left_out[name] = str(error).splitlines()[0]
            if name in OURS and sageattention.counts().fallbacks:
                left_out[name] = f"fell back: {sageattention.counts().fallbacks}"
    for name, reason in left_out.items():
        print(f"  {name} left out: {reason}", flush=True)
        samples.pop(name, None)
        outputs.pop(name, None)
    medians = {name: [statistics.median(part) for part in zip(*times)] for name, times in samples.items()}
    rows = []
    for name, (whole, attention) in medians.items():
        row = {"model": what, "contestant": name, "whole_ms": whole, "attention_ms": attention, "faster": {}}
        for peer in medians:
            if name in OURS and peer not in OURS:
                row["faster"][peer] = {"whole": medians[peer][0] / whole, "attention": medians[peer][1] / attention}
        exact = outputs["torch's choice"].double()
        row["relative_l1"] = ((outputs[name].double() - exact).abs().sum() / exact.abs().sum()).item()
        rows.append(row)
        ratios = "".join(
            f"  {by['whole']:.2f}x whole, {by['attention']:.2f}x attention of {peer}" for peer, by in row["faster"].items()
        )
        print(f"  {name:<18}{whole:>10.2f} ms, attention {attention:>10.2f} ms, differs by {row['relative_l1']:.4f}{ratios}", flush=True)
    return rows


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contestant")
    parser.add_argument("--passes", type=int, default=3, help="timed passes of a turn, after one that is not")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("end_to_end: torch finds no CUDA GPU")
    large = options.device == "cuda"
    result = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name() if large else None, "rows": []}
    chosen = [name for name in options.only.split(",") if name] or list(MODELS)
    for name in chosen:
        if name not in MODELS:
            sys.exit(f"end_to_end: model is {name}, expected of {', '.join(MODELS)}")
        make, needs = MODELS[name]
        if importlib.util.find_spec(needs) is None:
            print(f"left out: {name}, as Python has no {needs} here")
            continue
        start = time.perf_counter()
        for what, run in make(options.device, large):
            print(what, flush=True)
            result["rows"] += measure(what, run, Clock(options.device), options.rounds, options.passes)
        print(f"  {time.perf_counter() - start:.1f} s for all of it")
        if large:
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if not any(row["contestant"] in OURS for row in result["rows"]):
        sys.exit("end_to_end: nothing of ours was measured")


if __name__ == "__main__":
    main()
