"""What stands behind a model's attention: which scheme a call has, and what became of it.

ComfyUI calls `override(func, q, k, v, heads, mask, ...)`, where `func` is the attention that it would have called, and
`transformer_options` among the keywords says which block and which sigma the call belongs to.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from typing import Any, Callable, Optional

from sageattention import HybridSchedule, sageattn

_log = logging.getLogger("sageattention")

COMFYUI = "ComfyUI's own attention"
# Keywords that are read here, or that change nothing: `attn_precision` asks for sums in 32 bits, which ours are.
_KNOWN = {"attn_precision", "transformer_options", "enable_gqa", "_inside_attn_wrapper"}


def parse_blocks(text: str) -> Optional[frozenset[int]]:
    """Blocks as a person writes them, "0-9, 15"; None is all of them.

    Raises:
        ValueError: names what is no block.
    """
    if text.strip().lower() in ("", "all"):
        return None
    blocks: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise ValueError(f"blocks: value is {part.strip()}, expected all, a number, or two with - between them")
        if last and int(last) < int(first):
            raise ValueError(f"blocks: value is {part.strip()}, expected the smaller number first")
        blocks.update(range(int(first), int(last or first) + 1))
    return frozenset(blocks)


class AttentionOverride:
    """An attention override with a scheme for each block and step, which counts what it did.

    Args:
        scheme: Of the steps between the first and the last; None is the device's own choice.
        outer: Of the first and last steps.
        first, last: How many those are.
        blocks: Numbers of the blocks that are accelerated; None is all of them. Others keep ComfyUI's attention, and so
            do calls of no block, when blocks are named.
        previous: An override that the model had before: it gets what is left to ComfyUI.
    """

    def __init__(
        self,
        scheme: Optional[str] = None,
        outer: Optional[str] = None,
        first: int = 0,
        last: int = 0,
        blocks: Optional[frozenset[int]] = None,
        previous: Optional[Callable[..., Any]] = None,
    ) -> None:
        # Names and numbers are checked here, and not when the first image is half done.
        HybridSchedule(max(1, first + last + 1), first=first, last=last, outer=outer, inner=scheme)
        self.scheme, self.outer, self.first, self.last = scheme, outer, first, last
        self.blocks, self.previous = blocks, previous
        self._sigmas: Any = None
        self._scheme_of_sigmas: Optional[str] = scheme
        self.reset()

    def reset(self) -> None:
        """Counts from zero again."""
        self.accelerated: Counter[tuple[str, str]] = Counter()
        self.left: Counter[str] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionOverride:
        # Nodes clone a model and copy its options; what clones do is counted here all the same.
        return self

    def __call__(
        self,
        func: Callable[..., Any],
        q: Any,
        k: Any,
        v: Any,
        heads: int,
        mask: Any = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Attention of `[batch, seq, heads * head_dim]`, or of `[batch, heads, seq, head_dim]` with `skip_reshape`."""
        options = kwargs.get("transformer_options") or {}
        block = options.get("block_index")
        scale = kwargs.get("scale")
        reason = self._why_not(block, kwargs)
        if reason is None:
            scheme = self._scheme(options)
            try:
                out = _attention(q, k, v, heads, mask, skip_reshape, skip_output_reshape, scale, scheme)
            except (NotImplementedError, TypeError, ValueError) as error:
                reason = str(error)
            else:
                self.accelerated["no block" if block is None else f"block {block}", scheme or "auto"] += 1
                return out
        if not self.left[reason]:
            _log.info("%s computes a call: %s", COMFYUI, reason)
        self.left[reason] += 1
        if self.previous is not None:
            func = functools.partial(self.previous, func)
        return func(
            q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape, **kwargs,
        )  # fmt: skip

    def _why_not(self, block: Any, kwargs: dict[str, Any]) -> Optional[str]:
        if self.blocks is not None and block not in self.blocks:
            return "its block is not among those that are accelerated"
        if kwargs.get("low_precision_attention", True) is False:
            return "the model asks for full precision (low_precision_attention)"
        unknown = sorted(
            name
            for name, value in kwargs.items()
            if value is not None and name not in _KNOWN | {"scale", "low_precision_attention"}
        )
        return f"{unknown[0]} is not known here" if unknown else None

    def _scheme(self, options: dict[str, Any]) -> Optional[str]:
        """The scheme of the step whose sigma this is."""
        if self.first == 0 and self.last == 0:
            return self.scheme
        sigmas, all_sigmas = options.get("sigmas"), options.get("sample_sigmas")
        if sigmas is None or all_sigmas is None:
            # Outside of a sampler there are no steps: the scheme that bears less error is not wrong.
            return self.outer
        # One tensor for all calls of a step. Reading it waits for the GPU, which is done once a step therefore.
        if sigmas is not self._sigmas:
            self._sigmas = sigmas
            steps = max(1, len(all_sigmas) - 1)
            step = int((all_sigmas[:steps] - sigmas.flatten()[0]).abs().argmin())
            outer = step < self.first or step >= steps - self.last
            self._scheme_of_sigmas = self.outer if outer else self.scheme
        return self._scheme_of_sigmas

    def report(self) -> str:
        """What became of calls so far, in lines for a person."""
        total, left = sum(self.accelerated.values()), sum(self.left.values())
        lines = [f"SageAttention computed {total} of {total + left} calls of attention."]
        schemes: Counter[str] = Counter()
        for (_, scheme), number in self.accelerated.items():
            schemes[scheme] += number
        lines += [f"  {number} with {scheme}" for scheme, number in schemes.most_common()]
        blocks = {block for block, _ in self.accelerated}
        if blocks:
            lines.append(f"  in {len(blocks)} places: {', '.join(sorted(blocks, key=_by_number))}")
        lines += [f"{number} were left to {COMFYUI}: {reason}" for reason, number in self.left.most_common()]
        return "\n".join(lines)


def _by_number(block: str) -> tuple[int, str]:
    number = block.rpartition(" ")[2]
    return (int(number) if number.isdecimal() else -1, block)


def _attention(
    q: Any,
    k: Any,
    v: Any,
    heads: int,
    mask: Any,
    skip_reshape: bool,
    skip_output_reshape: bool,
    scale: Optional[float],
    scheme: Optional[str],
) -> Any:
    layout = "HND" if skip_reshape else "NHD"
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        # k and v may have fewer heads than q.
        q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in (q, k, v))
    if mask is not None:
        # ComfyUI's masks lack the axis of heads, or that of the batch too.
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    out = sageattn(q, k, v, layout, sm_scale=scale, attn_mask=mask, scheme=scheme)
    if skip_output_reshape:
        return out if skip_reshape else out.transpose(1, 2)
    return (out.transpose(1, 2) if skip_reshape else out).flatten(2)
