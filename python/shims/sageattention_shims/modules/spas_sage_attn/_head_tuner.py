"""Thresholds for one head: which leave out most blocks at an error within a bound."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from sageattention._block_maps import sparsity
from sageattention._frameworks import dense, major_capability, predict
from sageattention._predictor import Predictor, fields
from sageattention._request import request
from sageattention._sdpa import torch_sdpa
from sageattention._sparge_schemes import scheme_on
from torch import Tensor

# Self-similarities that are tried.
GRID = [step / 16 for step in range(-16, 16)]
# Of so many neighbours of the grid the thresholds are one.
_NEIGHBOURS = 2
# How finely the share of the weight is searched, and where the search begins.
_PRECISION, _FIRST = 0.001, 0.1
# More than rounding changes a self-similarity by.
_ROUNDING = 1e-3
# With fewer blocks left out than this, higher similarities are not tried: they leave out fewer still.
_LEAST_SPARSITY = 0.1


class Point(NamedTuple):
    """Thresholds of a head, and the share of blocks that they leave out."""

    simthreshd1: float
    cdfthreshd: float
    sparsity: float
    data: int
    """Which call they were tuned on."""


class Rule(NamedTuple):
    """What bounds the error of a head's output."""

    name: str
    l1: float
    cos_sim: float
    rmse: float

    def check(self) -> None:
        """Refuses bounds that cannot be.

        Raises:
            ValueError: naming the bound.
        """
        if self.name not in ("l1", "cosine", "rmse"):
            raise ValueError(f"sim_rule: value is {self.name}, expected l1, cosine or rmse")
        if not self.l1 >= 0:
            raise ValueError(f"l1: value is {self.l1}, expected at least 0")
        if not self.cos_sim <= 1:
            raise ValueError(f"cos_sim: value is {self.cos_sim}, expected at most 1")
        if not self.rmse >= 0:
            raise ValueError(f"rmse: value is {self.rmse}, expected at least 0")

    def holds(self, found: Tensor, wanted: Tensor) -> bool:
        """Whether an output is within the bound."""
        found, wanted = found.float(), wanted.float()
        if self.name == "l1":
            return bool((found - wanted).abs().sum() / wanted.abs().sum() < self.l1)
        if self.name == "cosine":
            return bool(F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > self.cos_sim)
        return bool((found - wanted).square().mean().sqrt() < self.rmse)


class HeadTuner:
    """One head of a call, and what is known of its maps."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Optional[Tensor],
        head: int,
        is_causal: bool,
        scale: Optional[float],
        smooth_k: bool,
        rule: Rule,
    ) -> None:
        kv_head = head // max(1, q.shape[1] // max(1, k.shape[1]))
        self._q, self._k, self._v = q[:, head : head + 1], k[:, kv_head : kv_head + 1], v[:, kv_head : kv_head + 1]
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, head : head + 1]
        self._mask = mask
        self._rule = rule
        self._request = request(
            "HND",
            is_causal,
            scale,
            causal_alignment="top_left",
            scheme=scheme_on(q, "sparge-int8-fp8"),
            nearest=True,
            smooth_k=smooth_k,
        )
        self._options: dict[str, Any] = {"smooth_k": self._request.smooth_k}
        if major_capability(q) == 9:
            self._options.update(block_q=64, block_k=128)
        causal = {"is_causal": self._request.is_causal}
        if mask is not None and self._request.is_causal:
            # torch takes one of them.
            causal = {}
            mask = _with_causal(mask, q.shape[2], k.shape[2], q.dtype)
        self.wanted = torch_sdpa(self._q, self._k, self._v, attn_mask=mask, scale=self._request.sm_scale, **causal)
        # Whether a map is within the bound, and what it leaves out: neighbours of the grid often have the same.
        self._known: dict[bytes, tuple[bool, float]] = {}

    def points(self, data: int) -> list[Point]:
        """The least share of the weight within the bound for each self-similarity of the grid."""
        points: list[Point] = []
        similarities = self._similarities()
        for simthreshd1 in GRID:
            if points and not _between(similarities, points[-1].simthreshd1, simthreshd1):
                # The same blocks are similar, and so all maps are the same.
                points.append(points[-1]._replace(simthreshd1=simthreshd1))
                continue
            cdfthreshd = self._least(simthreshd1)
            _, left_out = self._judged(simthreshd1, cdfthreshd)
            points.append(Point(simthreshd1, cdfthreshd, left_out, data))
            if left_out < _LEAST_SPARSITY:
                break
        return points

    def _similarities(self) -> Tensor:
        """Self-similarities of all blocks, up to rounding."""
        predictor = self._predictor(0.0, 0.0)
        k = self._k.double()
        if predictor.smooth_k:
            k = k - k.mean(dim=2, keepdim=True)
        blocks = (*self._q.double().split(predictor.block_q, dim=2), *k.split(predictor.block_k, dim=2))
        return torch.cat([F.normalize(x, dim=-1).mean(dim=2).square().sum(dim=-1).flatten() for x in blocks])

    def _predictor(self, simthreshd1: float, cdfthreshd: float) -> Predictor:
        return Predictor.sparge_attn(simthreshd1=simthreshd1, cdfthreshd=cdfthreshd).replace(**self._options)

    def _least(self, simthreshd1: float) -> float:
        """The least share within the bound, by bisection; 1 where none is."""
        low, high, share = 0.0, 1.0, _FIRST
        while high - low > _PRECISION:
            if self._judged(simthreshd1, share)[0]:
                high = share
            else:
                low = share
            share = (low + high) / 2
        return high

    def _judged(self, simthreshd1: float, cdfthreshd: float) -> tuple[bool, float]:
        """Whether these thresholds are within the bound, and the share of blocks that they leave out."""
        predictor = self._predictor(simthreshd1, cdfthreshd)
        block_map = predict(self._q, self._k, fields(predictor, self._q, "HND"), self._request)
        key = bytes(block_map.flatten().tolist())
        if key not in self._known:
            sizes = (predictor.block_q, predictor.block_k)
            found = dense(
                self._q, self._k, self._v, self._request, attn_mask=self._mask, block_mask=(block_map, *sizes)
            )
            left_out = sparsity(
                block_map, *sizes, self._q.shape[2], [self._k.shape[2]] * self._q.shape[0], self._request
            )
            self._known[key] = (self._rule.holds(found, self.wanted), left_out)
        return self._known[key]


def chosen(points: list[Point]) -> Point:
    """A head's thresholds: of the neighbouring similarities that leave out most blocks over all calls, the largest of
    each threshold, so that what was within the bound on one call is likely to be on others."""
    groups: dict[int, list[Point]] = {}
    for point in points:
        groups.setdefault(GRID.index(point.simthreshd1) // _NEIGHBOURS, []).append(point)
    best = max(groups.values(), key=lambda group: sum(point.sparsity for point in group))
    return Point(
        max(point.simthreshd1 for point in best),
        max(point.cdfthreshd for point in best),
        sum(point.sparsity for point in best) / len(best),
        best[0].data,
    )


def _between(similarities: Tensor, low: float, high: float) -> bool:
    """Whether some block might be similar by one threshold and not by the other, whichever way it is rounded."""
    return bool(((similarities > low - _ROUNDING) & (similarities <= high + _ROUNDING)).any())


def _with_causal(mask: Tensor, q_len: int, kv_len: int, dtype: torch.dtype) -> Tensor:
    seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=mask.device).tril()
    return mask & seen if mask.dtype == torch.bool else mask.to(dtype).masked_fill(~seen, float("-inf"))
