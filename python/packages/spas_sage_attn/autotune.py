"""SpargeAttn's tuner, by the original's names.

Programs import these names to find out whether SpargeAttn is there. Tuning needs the prediction of blocks from Q and K,
which does not exist here yet: whatever uses them raises NotImplementedError.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "SparseAttentionMeansim",
    "extract_sparse_attention_state_dict",
    "load_sparse_attention_state_dict",
]


def _no_tuning(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"spas_sage_attn.autotune.{name} is not supported: the prediction of blocks from Q and K, which it tunes, "
        "is not built yet; sageattention.sageattn computes all blocks"
    )


class SparseAttentionMeansim:
    """A module of attention whose thresholds are tuned for each head: raises NotImplementedError when made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise _no_tuning("SparseAttentionMeansim")


def extract_sparse_attention_state_dict(model: Any, verbose: bool = False) -> Any:
    """Raises NotImplementedError: no model can have such modules here."""
    raise _no_tuning("extract_sparse_attention_state_dict")


def load_sparse_attention_state_dict(
    model: Any, saved_state_dict: Any, multigpu: bool = False, verbose: bool = False
) -> Any:
    """Raises NotImplementedError: tuned thresholds would be of no effect here."""
    raise _no_tuning("load_sparse_attention_state_dict")
