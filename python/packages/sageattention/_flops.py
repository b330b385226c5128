"""Floating-point operations of the operators, for `torch.utils.flop_counter`."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula


def _attention(heads: int, pairs: int, head_dim: int, value_dim: int) -> int:
    """QKᵀ and PV, each a multiplication and an addition; masks save nothing, as torch counts its own."""
    return 2 * heads * pairs * (head_dim + value_dim)


def _heads_first_or_not(q: Any, k: Any, v: Any, tensor_layout: str) -> int:
    rows, heads = (1, 2) if tensor_layout == "NHD" else (2, 1)
    return _attention(q[0] * q[heads], q[rows] * k[rows], q[3], v[3])


def _packed(q: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int) -> int:
    if isinstance(cu_seqlens_q, FakeTensor) or cu_seqlens_q.device.type == "meta":
        # The lengths are not known: the longest, as torch counts its own.
        pairs = (cu_seqlens_q.shape[0] - 1) * max_seqlen_q * max_seqlen_k
    else:
        lengths_q, lengths_k = (boundaries.diff().tolist() for boundaries in (cu_seqlens_q, cu_seqlens_k))
        pairs = sum(q_len * kv_len for q_len, kv_len in zip(lengths_q, lengths_k))
    return _attention(q.shape[1], pairs, q.shape[2], v.shape[2])


def register(layout_position: int) -> None:
    """Formulas for the operators of `_torch`; `layout_position` is where the dense ones have `tensor_layout`."""
    operators = torch.ops.sageattention

    @register_flop_formula([operators.dense, operators.dense_lse])
    def dense(q: Any, k: Any, v: Any, *arguments: Any, **_: Any) -> int:
        return _heads_first_or_not(q, k, v, arguments[layout_position - 3])

    _register_packed([operators.varlen, operators.varlen_lse])


def _register_packed(operators: list[Any]) -> None:
    """The formula for operators of packed sequences."""

    @register_flop_formula(operators, get_raw=True)
    def varlen(
        q: Any, k: Any, v: Any, sinks: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, *_: Any, **__: Any
    ) -> int:
        return _packed(q, v, cu_q, cu_k, max_q, max_k)


def register_sparse(layout_position: int) -> None:
    """The formula for the operators of `_torch_sparse`: all blocks, as masks save nothing either."""
    operators = torch.ops.sageattention

    @register_flop_formula([operators.sparse, operators.sparse_lse, operators.sparse_map, operators.sparse_lse_map])
    def sparse(q: Any, k: Any, v: Any, *arguments: Any, **_: Any) -> int:
        return _heads_first_or_not(q, k, v, arguments[layout_position - 3])

    _register_packed([operators.sparse_varlen, operators.sparse_varlen_lse])


def register_sdpa() -> None:
    """The formula for the operator of `_sdpa`."""

    @register_flop_formula(torch.ops.sageattention.sdpa)
    def sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return _heads_first_or_not(query, key, value, "HND")
