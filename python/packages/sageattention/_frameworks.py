"""Whose tensors a call has. Frameworks are imported when their tensors arrive, never before."""

from __future__ import annotations

import sys
from typing import Any, Optional

from sageattention._predictor import Fields
from sageattention._request import Request

# The modules for torch's tensors, once some have come: importing takes its time even where there is nothing left to do.
_torch: Any = None
_torch_sparse: Any = None


def is_torch(x: Any) -> bool:
    """Whether a tensor is torch's."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _module_for(q: Any) -> Any:
    """The module that computes tensors of q's kind."""
    global _torch
    if not is_torch(q):
        from sageattention import _arrays

        return _arrays
    if _torch is None:
        from sageattention import _torch as module

        _torch = module
    return _torch


def _sparse_module_for(q: Any) -> Any:
    """The module that predicts blocks of tensors of q's kind."""
    global _torch_sparse
    if not is_torch(q):
        from sageattention import _arrays_sparse

        return _arrays_sparse
    if _torch_sparse is None:
        from sageattention import _torch_sparse as module

        _torch_sparse = module
    return _torch_sparse


def major_capability(x: Any) -> Optional[int]:
    """The major compute capability of the GPU that a torch tensor lies on: 9 is Hopper, 12 a Blackwell with FP4 by
    mma.sync. None on the CPU, and for other libraries, which do not tell."""
    return _module_for(x).major_capability(x) if is_torch(x) else None


def library_of(q: Any, **others: Any) -> Any:
    """What must be known of the library of q's kind to compute its arrays (`_arrays.Library`); the others are refused
    where they are of another, or lie elsewhere."""
    return _module_for(q).library_of(q, **others)


def is_compiling() -> bool:
    """Whether torch is tracing a graph."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def dense(
    q: Any,
    k: Any,
    v: Any,
    request: Request,
    *,
    attn_mask: Any = None,
    sinks: Any = None,
    kv_lens: Any = None,
    block_mask: Optional[tuple[Any, int, int]] = None,
    return_lse: bool = False,
) -> Any:
    """Attention of tensors `[batch, heads, seq, head_dim]`, or in the order that the request says."""
    return _module_for(q).dense(q, k, v, request, attn_mask, sinks, kv_lens, block_mask, return_lse)


def varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Optional[int],
    max_seqlen_k: Optional[int],
    request: Request,
    *,
    sinks: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention of packed sequences, `[total, heads, head_dim]`."""
    module = _module_for(q)
    return module.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, request, sinks, return_lse)


def sparse(
    q: Any,
    k: Any,
    v: Any,
    fields: Fields,
    request: Request,
    *,
    attn_mask: Any = None,
    sinks: Any = None,
    kv_lens: Any = None,
    return_lse: bool = False,
    return_map: bool = False,
) -> list[Any]:
    """Attention of the blocks that a predictor keeps: the output, and what else was asked for in the order of the
    arguments. The map is of booleans, `[batch, heads, q_blocks, k_blocks]`."""
    return _sparse_module_for(q).sparse(q, k, v, fields, request, attn_mask, sinks, kv_lens, return_lse, return_map)


def sparse_varlen(
    q: Any,
    k: Any,
    v: Any,
    lengths: tuple[Any, Any, Optional[int], Optional[int]],
    fields: Fields,
    request: Request,
    *,
    sinks: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention of the blocks that a predictor keeps of packed sequences, `[total, heads, head_dim]`; `lengths` are the
    boundaries of queries and of keys, and the longest of either."""
    return _sparse_module_for(q).sparse_varlen(q, k, v, lengths, fields, request, sinks, return_lse)


def predict(q: Any, k: Any, fields: Fields, request: Request, kv_lens: Any = None) -> Any:
    """The map of a prediction alone."""
    return _sparse_module_for(q).predict(q, k, fields, request, kv_lens)
