"""A small server of a language model whose keys and values stay quantised. Runs offline, on random weights.

    python python/examples/serve_with_cache.py                      # on the CPU
    python python/examples/serve_with_cache.py --device cuda --values fp8 --tokens 256

Requests of different lengths make one batch, padded on the left; the cache leaves the padding out. After each batch it
says how fast tokens came, what the cache takes and what one in the model's own dtype would, and how far the logits are
from those over transformers' own cache. `--model` names a model in place of random weights.
"""

from __future__ import annotations

import argparse
import time

import sageattention
import torch
import transformers


def random_model(device: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """SmolLM2-135M's attention (9 query heads, 3 key heads of 64 channels) in a model of 6 layers."""
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        attn_implementation="sage",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def batches(
    requests: int, longest: int, size: int, vocabulary: int, device: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompts of random tokens and lengths, so many at a time: ids, and which of them are tokens."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for first in range(0, requests, size):
        lengths = torch.randint(longest // 4, longest + 1, (min(size, requests - first),), generator=generator)
        mask = torch.arange(int(lengths.max())) >= (lengths.max() - lengths)[:, None]
        ids = torch.randint(1, vocabulary, mask.shape, generator=generator) * mask
        made.append((ids.to(device), mask.long().to(device)))
    return made


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's name or folder; random weights without it")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--values", default="int8", choices=["fp16", "bf16", "int8", "fp8"])
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens that each request is answered with")
    args = parser.parse_args()

    sageattention.register_transformers()
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.model is None:
        model = random_model(args.device, dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sage")
        model = model.to(args.device).eval()
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    options = dict(max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, pad_token_id=0)
    options.update(output_logits=True, return_dict_in_generate=True)
    for number, (ids, mask) in enumerate(
        batches(args.requests, args.prompt, args.batch, config.vocab_size, args.device)
    ):
        cache = sageattention.transformers_cache(values=args.values, max_cache_len=ids.shape[1] + args.tokens)
        start = time.perf_counter()
        answer = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        seconds = time.perf_counter() - start
        tokens = int(mask.sum()) + ids.shape[0] * (args.tokens - 1)
        plain = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * tokens * dtype.itemsize
        theirs = model.generate(ids, attention_mask=mask, **options)
        first, expected = answer.logits[0].float(), theirs.logits[0].float()
        error = ((first - expected).abs().sum() / expected.abs().sum()).item()
        same = (answer.sequences == theirs.sequences)[:, ids.shape[1] :].float().mean().item()
        print(
            f"batch {number}: {ids.shape[0]} requests, {args.tokens / seconds:.1f} tokens/s each; the cache takes "
            f"{cache.nbytes / 2**20:.2f} MiB, in {str(dtype).removeprefix('torch.')} {plain / 2**20:.2f} MiB; first "
            f"logits off by {error:.4f}, {same:.0%} of the tokens as over transformers' cache"
        )
    print(f"attention: {sageattention.counts()}")


if __name__ == "__main__":
    main()
