"""Values of options as callers have them: Python's, numpy's and torch's numbers, pairs, and how none is said."""

from __future__ import annotations

import operator
import sys
from typing import Any, Optional

from sageattention._keywords import shown

# Farther than any sequence is long, and within what torch's operators take.
FARTHEST = 2**31


def flag(name: str, value: Any) -> bool:
    """A truth value: a bool of any library, or 0 or 1."""
    if type(value) is bool:
        return value
    if not isinstance(value, (str, bytes, float)) and getattr(value, "shape", ()) == ():
        try:
            if value == 0 or value == 1:
                return bool(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise TypeError(f"{name}: value is {_described(value)}, expected True or False")


def number(name: str, value: Any) -> Optional[float]:
    """A real number of any library, or None."""
    if value is None or type(value) is float or _symbolic(value):
        return value
    if not isinstance(value, (bool, str, bytes)) and getattr(value, "shape", ()) == () and not _is_flag(value):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name}: value is {shown(value)}, expected a finite number above 0") from None
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name}: value is {_described(value)}, expected a number")


def integer(name: str, value: Any) -> int:
    """An integer of any library."""
    if type(value) is int or _symbolic(value):
        return value
    if not isinstance(value, bool) and getattr(value, "shape", ()) == () and not _is_flag(value):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: value is {_described(value)}, expected an integer")


def boundaries(name: str, values: Any) -> list[int]:
    """A list of boundaries of packed sequences."""
    return [integer(f"{name}[{index}]", value) for index, value in enumerate(values)]


def lengths(name: str, values: Any, longest: Optional[int]) -> list[int]:
    """How many keys each entry of the batch has, from the host's memory: a list, or an array of numpy's. `longest` is
    how many there are in k, or None where that cannot be told."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(values, numpy.ndarray):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise TypeError(
            f"{name}: type is {type(values).__name__}, expected a list of integers, an array of numpy or a tensor as q"
        )
    found = [integer(f"{name}[{index}]", value) for index, value in enumerate(values)]
    most = FARTHEST - 1 if longest is None else longest
    for index, value in enumerate(found):
        if not 0 <= value <= most:
            raise ValueError(f"{name}[{index}]: value is {value}, expected 0 to {most}, k's length")
    return found


def length(name: str, value: Any) -> Optional[int]:
    """A number of rows, or None."""
    if value is None:
        return None
    rows = integer(name, value)
    if type(rows) is int and not 0 <= rows <= FARTHEST:
        raise ValueError(f"{name}: value is {rows}, expected 0 to {FARTHEST}")
    return rows


def softcap(name: str, value: Any) -> Optional[float]:
    """A soft cap; 0 is none, as flash-attention has it."""
    cap = number(name, value)
    return None if cap is None or (type(cap) is float and cap == 0.0) else cap


def window(name: str, value: Any) -> tuple[Optional[int], Optional[int]]:
    """Limits (left, right) of a sliding window; None or -1 is no limit, on one side or as the whole."""
    if value is None:
        return (None, None)
    if not isinstance(value, (tuple, list)):
        if type(value) is int and value == -1:
            return (None, None)
        # One number is both sides to some programs, and the keys of a causal window to others.
        example = shown(value) if type(value) is int and value >= 0 else "128"
        raise TypeError(
            f"{name}: value is {_described(value)}, expected (left, right), such as ({example}, 0) or "
            f"({example}, {example}); -1 is no limit"
        )
    if len(value) != 2:
        raise ValueError(f"{name}: value is {shown(value)}, expected two limits, (left, right)")
    left, right = (_limit(f"{name}[{side}]", limit) for side, limit in enumerate(value))
    return (left, right)


def _limit(name: str, value: Any) -> Optional[int]:
    if value is None:
        return None
    limit = integer(name, value)
    if type(limit) is not int:
        return limit
    if limit < -1:
        raise ValueError(f"{name}: value is {limit}, expected -1 (no limit), None, 0 or more")
    return None if limit == -1 else min(limit, FARTHEST)


def _symbolic(value: Any) -> bool:
    """Whether a number is one of torch's that stand for any, while a graph is traced."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, (torch.SymInt, torch.SymFloat))


def _is_flag(value: Any) -> bool:
    """Whether a scalar of numpy or torch is a truth value: as a number it would be a slip."""
    return str(getattr(value, "dtype", "")).rpartition(".")[2] == "bool"


def _described(value: Any) -> str:
    if value is None:
        return "None"
    return f"{shown(value)}, of type {type(value).__name__}" if shown(value) != type(value).__name__ else shown(value)
