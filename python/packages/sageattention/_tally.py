"""Counts of what was computed here, and of what was left to torch and why."""

from __future__ import annotations

import threading
from typing import NamedTuple


class Counts(NamedTuple):
    """What became of attention so far."""

    accelerated: int
    """Calls on torch's tensors that were computed here, by whatever way they came: `patch`, transformers' "sage",
    `sageattn` or another function. Counted when they ran; a replayed CUDA graph counts once, at capture."""
    fallbacks: dict[str, int]
    """Calls to the replaced function, of transformers' and diffusers' "sage", and to torch's flash attention, that
    torch computed itself, for each reason. Under torch.compile they count when compiled."""


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
