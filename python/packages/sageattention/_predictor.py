"""Predictors of blocks: their options as callers write them, and as operators and the Rust module take them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional, Union

from sageattention import _native, _values
from sageattention._keywords import shown

# One value for all query heads, or one for each.
PerHead = Union[float, tuple[float, ...]]

_SELECTIONS = ("topk", "count", "cdf", "topk_topp", "sigmas")
# What the threshold of a selection is called.
_THRESHOLDS = {"topk": "topk", "cdf": "cdfthreshd", "topk_topp": "topk", "sigmas": "tau"}


class Predictor(NamedTuple):
    """Which blocks of the score matrix are worth computing, predicted from the means of blocks.

    A constructor for each system; `replace` changes single options. Predictors are immutable, hashable, and the same
    object serves any number of calls. Hyper-parameters that heads may have of their own are a number, or one for each
    query head: a tuple, a list, or a tensor, which is read to the host.

        Predictor.sparge_attn(topk=0.5, simthreshd1=-0.1)
        Predictor.sla(0.1).replace(block_q=128)

    | system | constructor | source |
    | --- | --- | --- |
    | SpargeAttn | `sparge_attn` | arXiv 2502.18137 |
    | SLA, SageSLA | `sla` | arXiv 2509.24006 |
    | SpargeAttention2 | `sparge_attn2` | arXiv 2602.13515 |
    | VSA | `vsa` | arXiv 2505.13389 |
    | Sol-Attn | `sol_attn` | arXiv 2607.24027 |
    """

    select: str
    """How a block of queries chooses: "topk" takes a share of all key blocks, "count" a number of them, "cdf" as many
    as have together at most a share of all weight, "topk_topp" the union of "topk" and as many as have at least a share
    of all weight, "sigmas" those whose score is so many standard deviations above the mean of their row. It keeps at
    least one."""
    threshold: PerHead = 0.0
    """topk, cdfthreshd or tau."""
    topp: PerHead = 0.0
    """The share of all weight of "topk_topp"."""
    num_blocks: int = 1
    """The number of blocks of "count"."""
    block_q: int = 64
    """Queries in a block. GPUs compute blocks of 64 and 128."""
    block_k: int = 64
    """Keys in a block."""
    smooth_k: bool = False
    """Whether the mean of K over all tokens is subtracted before keys are pooled."""
    simthreshd1: Optional[PerHead] = None
    """The self-similarity that a block must exceed for its mean to stand for it: others are computed with all blocks.
    None trusts every mean."""
    sink_k: tuple[int, int] = (0, 0)
    """Key blocks that every query attends to: from the first, up to the second."""
    sink_q: tuple[int, int] = (0, 0)
    """Query blocks that attend to every key."""
    original_tails: bool = False
    """Whether a block with fewer tokens than the others counts as not similar, as in the original SpargeAttn."""
    q_padding: Optional[tuple[int, ...]] = None
    """Where blocks of queries are padded: how many tokens of each count, which come first in it."""
    k_padding: Optional[tuple[int, ...]] = None
    """Likewise of keys. What attention sees is a mask's to say."""

    @staticmethod
    def sparge_attn(*, simthreshd1: Any, topk: Any = None, cdfthreshd: Any = None) -> Predictor:
        """SpargeAttn: a share `topk` of the blocks, or those with the share `cdfthreshd` of the weight, among blocks
        whose self-similarity exceeds `simthreshd1`; blocks of 128 queries and 64 keys, K smoothed. Its attention sink
        is `replace(sink_k=(0, 1))`.

        Raises:
            ValueError: unless exactly one of `topk` and `cdfthreshd` is given, or for a value out of range.
        """
        if (topk is None) == (cdfthreshd is None):
            found = "neither" if topk is None else "both"
            raise ValueError(f"topk, cdfthreshd: given are {found}, expected exactly one of them")
        select, threshold = ("topk", topk) if cdfthreshd is None else ("cdf", cdfthreshd)
        return Predictor(
            select, threshold, block_q=128, block_k=64, smooth_k=True, simthreshd1=simthreshd1
        )._normalised()

    @staticmethod
    def sla(topk: Any) -> Predictor:
        """SLA and SageSLA: the share `topk` of blocks of 64 queries and 64 keys, K smoothed."""
        return Predictor("topk", topk, smooth_k=True)._normalised()

    @staticmethod
    def sparge_attn2(topk: Any, topp: Any) -> Predictor:
        """SpargeAttention2: the union of the share `topk` of blocks and those with the share `topp` of the weight, in
        blocks of 128 queries and 64 keys."""
        return Predictor("topk_topp", topk, topp, block_q=128)._normalised()

    @staticmethod
    def vsa(topk: int) -> Predictor:
        """VSA: `topk` blocks by number, of 64 queries and 64 keys. Blocks of varying size are `q_padding` and
        `k_padding`."""
        return Predictor("count", num_blocks=topk)._normalised()

    @staticmethod
    def sol_attn(tau: Any) -> Predictor:
        """Sol-Attn: the blocks whose score exceeds the mean of their row by `tau` standard deviations, of 64
        queries and 64 keys."""
        return Predictor("sigmas", tau)._normalised()

    def replace(self, **options: Any) -> Predictor:
        """The predictor with other values of the named fields.

        Raises:
            ValueError, TypeError: for a field that there is not, or a value that it cannot have.
        """
        unknown = sorted(options.keys() - set(self._fields))
        if unknown:
            raise TypeError(f"{unknown[0]}: a predictor has no such option, expected one of {', '.join(self._fields)}")
        return self._replace(**options)._normalised()

    def _normalised(self) -> Predictor:
        """The predictor with plain numbers and tuples, whatever it was made of."""
        if self.select not in _SELECTIONS:
            raise ValueError(f"select: value is {shown(self.select)}, expected one of {', '.join(_SELECTIONS)}")
        return Predictor(
            self.select,
            per_head(_THRESHOLDS.get(self.select, "threshold"), self.threshold),
            per_head("topp", self.topp),
            _within("topk", 1, self.num_blocks),
            _within("block_q", 1, self.block_q),
            _within("block_k", 1, self.block_k),
            _values.flag("smooth_k", self.smooth_k),
            None if self.simthreshd1 is None else per_head("simthreshd1", self.simthreshd1),
            _blocks("sink_k", self.sink_k),
            _blocks("sink_q", self.sink_q),
            _values.flag("original_tails", self.original_tails),
            _sizes("q_padding", self.q_padding, self.block_q),
            _sizes("k_padding", self.k_padding, self.block_k),
        )


def per_head(name: str, value: Any) -> PerHead:
    """A hyper-parameter of any library as a number, or as a tuple of one for each head."""
    if type(value) is float:
        return value
    shape = getattr(value, "shape", ())
    if len(shape) > 1:
        raise ValueError(f"{name}: shape is {list(shape)}, expected one number, or one for each query head")
    if len(shape) == 1:
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(_number(f"{name}[{head}]", one) for head, one in enumerate(value))
    return _number(name, value)


def _number(name: str, value: Any) -> float:
    found = _values.number(name, value)
    if found is None:
        raise TypeError(f"{name}: value is None, expected a number, or one for each query head")
    return found


def _within(name: str, least: int, value: Any, most: int = _values.FARTHEST) -> int:
    found = _values.integer(name, value)
    if not least <= found <= most:
        raise ValueError(f"{name}: value is {found}, expected {least} to {most}")
    return found


def _blocks(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, range) and value.step == 1:
        value = (value.start, value.stop)
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: value is {shown(value)}, expected (first, end), blocks from first up to end")
    first, end = (_within(f"{name}[{at}]", 0, block) for at, block in enumerate(value))
    return (first, end)


def _sizes(name: str, value: Any, block: int) -> Optional[tuple[int, ...]]:
    if value is None:
        return None
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: value is {shown(value)}, expected the number of tokens that count in each block")
    return tuple(_within(f"{name}[{at}]", 0, size, block) for at, size in enumerate(value))


class Fields(NamedTuple):
    """A predictor as operators and `_native.Predictor` take it: hyper-parameters are lists, of one value for all heads
    or of one for each. No name is one of a `Request`'s."""

    select: str
    threshold: list[float]
    topp: list[float]
    num_blocks: int
    block_q: int
    block_k: int
    predict_smooth_k: bool
    simthreshd1: Optional[list[float]]
    sink_blocks: list[int]
    original_tails: bool
    q_padding: Optional[list[int]]
    k_padding: Optional[list[int]]


def fields(predictor: Any, q: Any, tensor_layout: str, packed: bool = False) -> Fields:
    """A predictor as operators take it, for the heads of q, which holds packed sequences or not."""
    if not isinstance(predictor, Predictor):
        raise TypeError(
            f"predictor: type is {type(predictor).__name__}, expected sageattention.sparse.Predictor, such as "
            "Predictor.sla(0.1)"
        )
    found = predictor._normalised()
    shape = getattr(q, "shape", ())
    rank, dimension = (3, 1) if packed else (4, 2 if tensor_layout == "NHD" else 1)
    # Of another rank, the call itself says what is wrong with q.
    heads = shape[dimension] if len(shape) == rank else None
    threshold = _THRESHOLDS.get(found.select, "threshold")
    return Fields(
        found.select,
        _listed(threshold, found.threshold, heads),
        _listed("topp", found.topp, heads),
        found.num_blocks,
        found.block_q,
        found.block_k,
        found.smooth_k,
        None if found.simthreshd1 is None else _listed("simthreshd1", found.simthreshd1, heads),
        [*found.sink_k, *found.sink_q],
        found.original_tails,
        None if found.q_padding is None else list(found.q_padding),
        None if found.k_padding is None else list(found.k_padding),
    )


def _listed(name: str, value: PerHead, heads: Optional[int]) -> list[float]:
    if not isinstance(value, tuple):
        return [value]
    # A list of one is one value for all to whoever takes it: here alone it is known to be meant for one head.
    if heads is not None and len(value) != heads:
        raise ValueError(f"{name}: shape is [{len(value)}], expected [{heads}], one for each query head")
    return list(value)


def native_predictor(found: tuple[Any, ...]) -> _native.Predictor:
    """Fields as the Rust module takes them."""
    return _made(tuple(tuple(field) if isinstance(field, list) else field for field in found))


@functools.lru_cache(maxsize=1024)
def _made(found: tuple[Any, ...]) -> _native.Predictor:
    return _native.Predictor(**dict(zip(Fields._fields, found)))
