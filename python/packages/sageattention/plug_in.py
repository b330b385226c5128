"""Models that become faster without being touched: torch's own function replaced, transformers taught a name."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple, Optional


class Counts(NamedTuple):
    """What became of the calls to the replaced function."""

    accelerated: int
    """Calls that were computed here, counted when they ran. A replayed CUDA graph counts once, at capture."""
    fallbacks: dict[str, int]
    """Calls that torch computed itself, for each reason. Under torch.compile they count when compiled."""


class _Tally:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accelerated = 0
        self._fallbacks: dict[str, int] = {}

    def accelerated(self) -> None:
        with self._lock:
            self._accelerated += 1

    def fell_back(self, reason: str) -> bool:
        """Whether it is the first time for this reason."""
        with self._lock:
            self._fallbacks[reason] = self._fallbacks.get(reason, 0) + 1
            return self._fallbacks[reason] == 1

    def read(self) -> Counts:
        with self._lock:
            return Counts(self._accelerated, dict(self._fallbacks))

    def reset(self) -> None:
        with self._lock:
            self._accelerated = 0
            self._fallbacks.clear()


tally = _Tally()


def patch(scheme: Optional[str] = None) -> None:
    """Replaces `torch.nn.functional.scaled_dot_product_attention`, for every model that looks it up there.

    All its arguments keep their meaning: `attn_mask` (bool or additive), `is_causal` (aligned top-left, as torch has
    it), `scale`, `enable_gqa`; under autocast q, k and v are cast, as torch does. What cannot be computed here
    (dropout, gradients, float32 on a GPU, heads of more than 256 channels, ...) goes to torch's function, with one line
    in the log `sageattention` for each reason. `counts()` tells how many calls were accelerated.

    Modules that have imported the function itself (`from torch.nn.functional import ...`) before keep torch's.

    Args:
        scheme: The name of a scheme, in place of the device's own choice.

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
def patched(scheme: Optional[str] = None) -> Iterator[None]:
    """As `patch`, for the time of a `with` block. Not for one thread alone: torch has one such function."""
    from sageattention import _sdpa

    before = _sdpa.state()
    _sdpa.patch(scheme)
    try:
        yield
    finally:
        _sdpa.restore(before)


def counts(reset: bool = False) -> Counts:
    """What became of the calls to the replaced function so far; `reset` then starts again from zero."""
    read = tally.read()
    if reset:
        tally.reset()
    return read


def register_transformers(name: str = "sage") -> None:
    """Teaches Hugging Face transformers `attn_implementation=name`.

    Causal and padding masks, sliding windows, grouped-query attention, KV caches, soft-capped logits and position
    biases are computed here; attention sinks, dropout and gradients raise NotImplementedError.
    """
    from sageattention import _transformers

    _transformers.register(name)
