"""The arithmetic of SpargeAttn's functions on the device at hand."""

from __future__ import annotations

from typing import Any

from sageattention._frameworks import major_capability

# Hopper's own matrix products have no sums in 16 bits, which these schemes have: there they are computed by the kernels
# for older GPUs. Ours sum in 32 bits and have a scale for each thread, which is no less accurate.
_ON_HOPPER = {
    "sparge-int8-fp8": "int8-fp8",
    "sparge-int8-fp16": "int8",
    "sparge-int8-fp16-triton": "int8",
}


def scheme_on(q: Any, scheme: str) -> str:
    """The scheme that computes one of SpargeAttn's where q lies."""
    return _ON_HOPPER[scheme] if major_capability(q) == 9 else scheme
