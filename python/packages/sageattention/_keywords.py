"""Keywords as callers spell them.

A function here stands in for several others, whose callers have names of their own for the same option. Each name is
taken, refused where it would change the result and nothing computes it, or ignored where it changes nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

# What callers write, and the parameters that it may be: the first that a function has.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    # flash-attention, yunchang and xDiT; torch, SpargeAttn and vLLM-Omni; transformers.
    "softmax_scale": ("sm_scale", "scale"),
    "scale": ("sm_scale",),
    "scaling": ("sm_scale", "scale"),
    "sm_scale": ("scale",),
    "causal": ("is_causal",),
    "window_size": ("window",),
    "softcap": ("logit_softcap",),
    "logits_soft_cap": ("logit_softcap",),
    "return_softmax_lse": ("return_lse",),
    "s_aux": ("sinks",),
    # flash-attention's of its newer kernels, and of its function over a cache.
    "seqused_k": ("kv_lens",),
    "cache_seqlens": ("kv_lens",),
    "layout": ("tensor_layout",),
    # Where a function of the original's has `smooth_k`, it is what `smoothing` is in `sageattn`.
    "smoothing": ("smooth_k",),
}

# What would change the result, with the values that do not; None never does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi_slopes": (),
    "attention_dropout": (0,),
    "attention_mask": (),
    "attention_sink": (0,),
    "attn_bias": (),
    "attn_dropout": (0,),
    "attn_mask": (),
    "bias": (),
    "block_mask": (),
    "block_table": (),
    "cache_seqlens": (),
    "causal": (0,),
    "causal_alignment": ("bottom_right",),
    "cdfthreshd": (),
    "cu_seqlens": (),
    "cu_seqlens_k": (),
    "cu_seqlens_q": (),
    "descale_k": (1,),
    "descale_q": (1,),
    "descale_v": (1,),
    "dropout": (0,),
    "dropout_p": (0,),
    "dropout_rate": (0,),
    "head_mask": (),
    "is_causal": (0,),
    "k_descale": (1,),
    "k_scale": (1,),
    "key_padding_mask": (),
    "kv_lens": (),
    "layout": ("HND",),
    "leftpad_k": (),
    "logit_softcap": (0,),
    "logits_soft_cap": (0,),
    "mask": (),
    "mask_id": (),
    "need_weights": (0,),
    "out": (),
    "output": (),
    "output_attentions": (0,),
    "output_dtype": (),
    "page_table": (),
    "position_bias": (),
    "q_descale": (1,),
    "q_scale": (1,),
    "return_attn_probs": (0,),
    "return_attn_weights": (0,),
    "return_lse": (0,),
    "return_map": (0,),
    "return_softmax": (0,),
    "return_softmax_lse": (0,),
    "return_sparsity": (0,),
    "s_aux": (),
    "scale": (),
    "scaling": (),
    "scheme": (),
    "score_mod": (),
    "seqlens_k": (),
    "seqused_k": (),
    "seqused_q": (),
    "simthreshd1": (),
    "sinks": (),
    "sliding_window": (-1,),
    "sm_scale": (),
    "smoothing": (1,),
    "softcap": (0,),
    "softmax_scale": (),
    "tensor_layout": ("HND",),
    "topk": (),
    "v_descale": (1,),
    "v_scale": (1,),
    "window": ((-1, -1), -1),
    "window_size": ((-1, -1), -1),
}

# What to use in place of a keyword that is refused.
_INSTEAD = {
    "attention_mask": "attn_mask takes a mask that broadcasts to [batch, heads, q_len, kv_len]",
    "attn_bias": "attn_mask takes a bias that broadcasts to [batch, heads, q_len, kv_len]",
    "bias": "attn_mask takes a bias that broadcasts to [batch, heads, q_len, kv_len]",
    "cache_seqlens": "cu_seqlens_k has the lengths of packed keys",
    "kv_lens": "cu_seqlens_k has the lengths of packed keys",
    "mask": "attn_mask takes a mask that broadcasts to [batch, heads, q_len, kv_len]",
    "seqused_k": "cu_seqlens_k has the lengths of packed keys",
    "scheme": "sageattn and sageattn_varlen take the name of a scheme",
    "sliding_window": "window takes (left, right)",
}

# Hints to kernels that are not ours, and options of other functions of the original: they choose how, not what.
_HARMLESS = {
    "deterministic",
    "dtype",
    "enable_gqa",
    "heads",
    "num_splits",
    "pack_gqa",
    "per_block_mean",
    "pv_accum_dtype",
    "qk_quant_gran",
    "quantization_backend",
    "sm_margin",
    "smooth_k",
    "smooth_q",
    "smooth_v",
    "training",
}

# Names so alike that one is taken for a slip of the other.
_ALIKE = 0.85

_Function = TypeVar("_Function", bound=Callable[..., Any])


def callers_keywords(function: _Function) -> _Function:
    """The function, taking its callers' spellings; its own `**kwargs` stays empty."""
    signature = inspect.signature(function)
    own = tuple(name for name, parameter in signature.parameters.items() if parameter.kind is not parameter.VAR_KEYWORD)
    known = frozenset(own)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                args, kwargs = _translated(function.__name__, own, args, kwargs)
                break
        return function(*args, **kwargs)

    # For programs that look at parameters without following `__wrapped__`.
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _translated(
    function: str, own: tuple[str, ...], args: tuple[Any, ...], given: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords by the function's own names."""
    taken = {name: value for name, value in given.items() if name in own}
    said_by = dict.fromkeys(own, "")
    for name, value in given.items():
        if name in own or value is None:
            continue
        target = next((target for target in _SPELLINGS.get(name, ()) if target in own), None)
        if target is None:
            _check_left_over(function, own, name, value)
            continue
        position = own.index(target)
        before = args[position] if position < len(args) else taken.get(target)
        if before is not None and not _same(before, value):
            raise TypeError(
                f"{name}: value is {shown(value)}, expected {shown(before)}, as {said_by[target] or target}: they are "
                "names of one option"
            )
        said_by[target] = name
        if position < len(args):
            args = (*args[:position], value, *args[position + 1 :])
        else:
            taken[target] = value
    return args, taken


def _check_left_over(function: str, own: tuple[str, ...], name: str, value: Any) -> None:
    """Lets a keyword pass that changes nothing; refuses one that would be silently dropped."""
    neutral = _NEUTRAL.get(name)
    if neutral is not None:
        if any(_same(value, harmless) for harmless in neutral):
            return
        wanted = " or ".join(str(harmless) for harmless in (None, *neutral))
        instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise NotImplementedError(
            f"{name}: value is {shown(value)}, expected {wanted}: {function} does not compute it{instead}"
        )
    if name in _HARMLESS:
        return
    # Imported where it is needed: reading it takes longer than all else here.
    import difflib

    meant = difflib.get_close_matches(name, sorted({*own, *_SPELLINGS, *_NEUTRAL}), 1, _ALIKE)
    if meant:
        raise TypeError(f"{name}: {function} has no such keyword, expected {meant[0]}")


def _same(x: Any, y: Any) -> bool:
    """Whether two values of an option are one: numbers of any library, tuples and lists alike."""
    if x is y:
        return True
    x, y = (tuple(value) if isinstance(value, list) else value for value in (x, y))
    if isinstance(x, (str, tuple)) or isinstance(y, (str, tuple)):
        return type(x) is type(y) and x == y
    if getattr(x, "shape", ()) != () or getattr(y, "shape", ()) != ():
        return False
    try:
        return bool(x == y)
    except (TypeError, ValueError):
        return False


def shown(value: Any) -> str:
    """A value in a message: what a person wrote, or the type of what is too long for a line."""
    if isinstance(value, (type(None), bool, int, float, complex, str, tuple, list)) and len(str(value)) <= 60:
        return str(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return str(value.item())
    return type(value).__name__
