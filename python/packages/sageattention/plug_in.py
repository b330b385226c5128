"""Models that become faster without being touched: torch's own function replaced, transformers and diffusers taught."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Optional, Union

from sageattention._schedule import HybridSchedule
from sageattention._tally import Counts, tally


def patch(scheme: Union[str, HybridSchedule, None] = None) -> None:
    """Replaces `torch.nn.functional.scaled_dot_product_attention`, for every model that looks it up there.

    All its arguments keep their meaning: `attn_mask` (bool or additive), `is_causal` (aligned top-left, as torch has
    it), `scale`, `enable_gqa`; values may have other channels than keys, and one batch of keys and values be that of
    many of queries. Under autocast q, k and v are cast, and tensor subclasses and `TorchFunctionMode`s see the call
    first, as torch does. What cannot be computed here (dropout, gradients and tangents, float32 on a GPU, heads that
    no kernel has, ...) goes to torch's function, with one line in the log `sageattention` for each reason, and so does
    every call while some of torch's kernels are switched off (`torch.nn.attention.sdpa_kernel`). `counts()` tells how
    many calls were accelerated.

    `torch.nn.MultiheadAttention` and `TransformerEncoderLayer` have a fast path of their own for inference, which never
    calls the function: it is switched off (`torch.backends.mha.set_fastpath_enabled`) until `unpatch`; who switches it
    on again after `patch` keeps it, and those modules are not accelerated. Without it a `TransformerEncoder` computes
    padded positions too instead of returning zeros there.

    diffusers' pipelines are served too, its models' masks included, whatever attention backend they have chosen that
    calls torch's function ("native", which is the default).

    Modules that have imported the function itself (`from torch.nn.functional import ...`) before keep torch's; those
    of them that use `torch.nn.attention.bias`, which asks for the function by its name, must not be compiled while
    patched. Models that `torch.jit.script` compiles are given torch's function.

    Args:
        scheme: The name of a scheme, in place of the device's own choice; or a `HybridSchedule`, whose scheme of the
            step at hand each call has.

    Raises:
        ValueError: if there is no such scheme.
    """
    from sageattention import _sdpa

    _sdpa.patch(scheme)


def unpatch() -> None:
    """Puts torch's function back. Does nothing where it is in place."""
    from sageattention import _sdpa

    _sdpa.unpatch()


@contextlib.contextmanager
def patched(scheme: Union[str, HybridSchedule, None] = None) -> Iterator[None]:
    """As `patch`, for the time of a `with` block. Not for one thread alone: torch has one such function."""
    from sageattention import _sdpa

    before = _sdpa.state()
    _sdpa.patch(scheme)
    try:
        yield
    finally:
        _sdpa.restore(before)


def counts(reset: bool = False) -> Counts:
    """What became of calls so far: how many were computed here, how many were left to torch and why.

    `reset` then starts again from zero. A count of zero after a model has run means that it did not come here: see
    `patch` for the ways around it.
    """
    read = tally.read()
    if reset:
        tally.reset()
    return read


def register_transformers(name: str = "sage", scheme: Optional[str] = None) -> None:
    """Teaches Hugging Face transformers `attn_implementation=name`.

    Causal and padding masks, sliding windows, grouped-query attention, KV caches, soft-capped logits, attention sinks
    and position biases are computed here. What is not goes to transformers' own "sdpa", or to the model's "eager" for
    what SDPA cannot do: heads that no kernel has, dropout and gradients while training, float32 on a GPU. The log
    `sageattention` has a line for each reason, and `counts()` the numbers.
    `transformers_cache` keeps keys and values quantised.

    Args:
        name: What models are to call it. Several names may have several schemes.
        scheme: The name of a scheme, in place of the device's own choice.

    Raises:
        ValueError: if there is no such scheme.
    """
    from sageattention import _transformers

    _transformers.register(name, scheme)


def transformers_cache(
    *, keys: str = "int8", values: str = "fp16", page_size: int = 64, max_cache_len: Optional[int] = None
) -> Any:
    """A quantised KV cache for Hugging Face transformers, for models with `attn_implementation="sage"`:

        sageattention.register_transformers()
        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="sage")
        model.generate(**inputs, past_key_values=sageattention.transformers_cache(values="int8"))

    (From transformers 5.24 on the argument is also called `cache`.) Attention reads the codes where they lie, as in
    `KvCache`; nothing is expanded. Causal masks, sliding windows, left padding (whose tokens are not kept), soft caps
    and attention sinks are computed on the CPU and on GPUs, and on the CPU any mask. Where something needs the keys
    themselves (another attention implementation, dropout, gradients) it raises NotImplementedError. Cropping works;
    beam search does on the CPU, where beams share pages. Cross attention and models whose layers keep other states need
    another cache.

    Args:
        keys: "int8".
        values: "fp16", "bf16", "int8" or "fp8", as in `KvCache`.
        page_size: Tokens of a page.
        max_cache_len: The most tokens of a sequence; needed on a GPU.

    Returns:
        A `transformers.Cache` for one batch; `reset()` makes it ready for another of the same size, and `nbytes` is
        what it takes.

    Raises:
        ValueError: what is wrong with an option, at the first tokens.
    """
    from sageattention import _transformers_cache

    return _transformers_cache.SageCache(keys=keys, values=values, page_size=page_size, max_cache_len=max_cache_len)


def register_diffusers(scheme: Union[str, HybridSchedule, None] = None) -> None:
    """Puts our functions behind diffusers' attention backends "sage", "sage_varlen" and "_sage_qk_int8_pv_...".

    diffusers finds the package by itself, but its own code for these backends refuses masks, grouped heads, values of
    other channels than keys, and tensors on the CPU on our behalf; after this call they are computed, so that
    `model.set_attention_backend("sage")`, `attention_backend("sage")` and `DIFFUSERS_ATTN_BACKEND=sage` serve models
    with masked text too. `return_lse` gives float32 `[batch, heads, q_len]`, under context parallelism
    `[batch, q_len, heads]`, as diffusers has it. Rings, Ulysses and both together
    (`enable_parallelism`) work for every one of them, with masks: in a ring each part of the keys has its own part of
    the mask, where diffusers hands one mask to all. A causal mask is aligned top-left, as torch has it.

    What is not computed here goes to diffusers' native backend: dropout, gradients, float32 on a GPU, heads that no
    kernel has. The log `sageattention` has a line for each reason, and `counts()` the numbers.

    Models that call torch's function themselves (SD3, CogVideoX, Mochi, Sana, ...) have no backend: for them there is
    `patch`.
    "sage_hub" and "sage_blackwell_hub" stay what they are: names of kernels that diffusers downloads.

    Args:
        scheme: What "sage" and "sage_varlen" compute: the name of a scheme, a `HybridSchedule`, or None for the
            device's own choice. The other backends are schemes of their own; where a device lacks one, the nearest is
            computed.

    Raises:
        ValueError: if there is no such scheme.
        ImportError: if there is no diffusers, or one before 0.36.
    """
    from sageattention import _diffusers

    _diffusers.register(scheme)


def register_flash_attention(name: str = "sage", scheme: Union[str, HybridSchedule, None] = None) -> None:
    """Makes our kernels one of torch's flash-attention implementations.

        sageattention.register_flash_attention()
        torch.nn.attention.activate_flash_attention_impl("sage")
        ...
        torch.nn.attention.restore_flash_attention_impl()

    While it is active, every call of torch's function that would be computed by FlashAttention on an NVIDIA GPU is
    computed here, and so are `torch.compile`d graphs, `torch.distributed.tensor.experimental.context_parallel` and
    `torch.nn.attention.varlen.varlen_attn`: it is the operator that is replaced, not a function's name. torch never
    gives that operator a mask: masked calls stay with torch's other kernels, and `patch` is what takes them. cuDNN's
    attention, which torch prefers on some GPUs, is switched off meanwhile (`torch.backends.cuda.enable_cudnn_sdp`).

    What is not computed here goes to torch's own kernel, with one line in the log `sageattention` for each reason:
    dropout, gradients, heads that no kernel has. There is no backward pass yet: where a forward pass cannot know that
    one will follow (a compiled graph, `context_parallel`), the backward pass raises NotImplementedError.

    Args:
        name: What `activate_flash_attention_impl` is to call it.
        scheme: The name of a scheme, in place of the device's own choice; or a `HybridSchedule`, whose scheme of the
            step at hand each call has.

    Raises:
        ValueError: if there is no such scheme.
        NotImplementedError: if torch has no such registry.
    """
    from sageattention import _flash

    _flash.register(name, scheme)
