"""Schemes that change from step to step of a diffusion process."""

from __future__ import annotations

from typing import Any, Optional, Union

from sageattention import _values
from sageattention._request import check_scheme
from sageattention.core import sageattn


class HybridSchedule:
    """One scheme for the first and last steps of a diffusion process, a faster one for those between.

    The first steps decide what an image shows and the last ones its details; those between bear more error, which is
    why SageAttention3's authors advise FP4 for them alone.

        schedule = HybridSchedule(30, first=4, last=4)
        with sageattention.patched(schedule):
            pipe(prompt, num_inference_steps=30, callback_on_step_end=schedule.on_step_end)

    A program with an attention function of its own calls the schedule as it would `sageattn`, and `schedule.step()`
    after each step. After the last step a new process begins, so that one schedule serves any number of them.

    Args:
        steps: Steps of a process, at least 1. A step may call attention any number of times.
        first: Steps at the start with the outer scheme.
        last: Steps at the end with the outer scheme; with `first` at most `steps`.
        outer: The name of a scheme; None is the device's own choice, in 8 and 16 bits.
        inner: The name of a scheme. FP4 needs a GPU of compute capability 12, or the CPU: elsewhere calls raise
            NotImplementedError, which names the nearest scheme.

    Raises:
        ValueError, TypeError: names the argument.

    Source: SageAttention3, https://arxiv.org/abs/2505.11594, and its repository's advice on timesteps.
    """

    steps: int
    first: int
    last: int
    at: int
    """The step at hand, counted from 0."""
    scheme: Optional[str]
    """The scheme of the step at hand; None for the device's own choice."""

    def __init__(
        self,
        steps: int,
        *,
        first: int = 1,
        last: int = 1,
        outer: Optional[str] = None,
        inner: Optional[str] = "sage3-nvfp4",
    ) -> None:
        for name, value, least in (("steps", steps, 1), ("first", first, 0), ("last", last, 0)):
            value = _values.integer(name, value)
            if value < least:
                raise ValueError(f"{name}: value is {value}, expected at least {least}")
            setattr(self, name, value)
        if self.first + self.last > self.steps:
            raise ValueError(
                f"first + last: value is {self.first + self.last}, expected at most {self.steps}, the steps"
            )
        check_scheme(outer)
        check_scheme(inner)
        self.outer, self.inner = outer, inner
        self.reset()

    def scheme_of(self, step: int) -> Optional[str]:
        """The scheme of a step, counted from 0."""
        inside = self.first <= step < self.steps - self.last
        return self.inner if inside else self.outer

    def step(self) -> None:
        """Ends a step; the first of a new process follows the last."""
        self.at = (self.at + 1) % self.steps
        self.scheme = self.scheme_of(self.at)

    def reset(self) -> None:
        """Begins a new process."""
        self.at = 0
        self.scheme = self.scheme_of(0)

    def on_step_end(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """diffusers' `callback_on_step_end`: `step`, counted from 0, is done."""
        self.at = (step + 1) % self.steps
        self.scheme = self.scheme_of(self.at)
        return callback_kwargs

    def __call__(self, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        """`sageattn` with the scheme of the step at hand."""
        return sageattn(q, k, v, *args, scheme=self.scheme, **kwargs)

    def __repr__(self) -> str:
        steps, first, last = self.steps, self.first, self.last
        return (
            f"HybridSchedule({steps}, {first=}, {last=}, outer={self.outer!r}, inner={self.inner!r}) at step {self.at}"
        )


# What plug-ins take for a scheme: a name, one that changes from step to step, or None for the device's own choice.
AnyScheme = Union[str, HybridSchedule, None]


def check_any_scheme(scheme: AnyScheme) -> None:
    """Refuses a name that no scheme has.

    Raises:
        ValueError: if there is no such scheme.
    """
    if not isinstance(scheme, HybridSchedule):
        check_scheme(scheme)


def scheme_now(scheme: AnyScheme) -> Optional[str]:
    """What is computed now."""
    return scheme.scheme if isinstance(scheme, HybridSchedule) else scheme
