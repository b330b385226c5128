"""SpargeAttn's tuner, by the original's names: thresholds of each head, found on a model's own calls.

    attention = SparseAttentionMeansim(l1=0.07)
    attention(q, k, v, tune_mode=True)    # for some inputs, at some steps
    attention(q, k, v)                    # from then on sparse

Files of thresholds that the original wrote are read, and it reads those that are written here.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Optional

import torch
from sageattention._predictor import Predictor
from sageattention._request import request
from sageattention._sparge_schemes import scheme_on
from sageattention._torch_inputs import refuse_derivatives
from torch import Tensor, nn

from spas_sage_attn._head_tuner import HeadTuner, Point, Rule, chosen
from spas_sage_attn.core import predicted

__all__ = [
    "SparseAttentionMeansim",
    "extract_sparse_attention_state_dict",
    "load_sparse_attention_state_dict",
]

_log = logging.getLogger("sageattention")

# Tensors of one entry for each query head; None until they are tuned, loaded or assigned.
_THRESHOLDS = ("is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd")
# Where the original skips no product that matters. Nothing is skipped here.
_PVTHRESHD = 50.0
# A head whose blocks are left out less than this is faster without predictions.
_LEAST_SPARSITY = 0.1


class SparseAttentionMeansim(nn.Module):
    """Attention whose sparsity is tuned for each head.

    While it is tuned (`tune_mode=True`, or a `TUNE_MODE` in the environment that is not empty) it computes attention of
    all blocks with torch's function, and searches for each head the thresholds that leave out most blocks at an error
    within the bound: a grid of self-similarities, and for each the least share of the weight, by bisection. Further
    calls add to what is known, and the best pair of neighbouring similarities over all calls decides. A head that has
    little to leave out becomes dense. Every candidate is judged by what this machine computes, quantisation included.

    Afterwards it computes `spas_sage2_attn_meansim_cuda` with those thresholds, and the first keys' blocks in any case.
    `torch.compile` takes it once it has thresholds.

    Attributes:
        is_sparse: bool `[heads]`; a head of False is dense. As all of these a parameter without gradient, None until it
            is tuned, loaded or assigned: whatever is assigned, a number or a list too, becomes one.
        cdfthreshd: float `[heads]`: the share of the weight that is kept.
        simthreshd1: float `[heads]`: the self-similarity that a block must exceed for its mean to stand for it.
        simthreshd2: `[heads]`, of no effect, as in the original.
        pvthreshd: `[heads]`. The original skips products with probabilities below `2 ** -pvthreshd`; here none is, so
            that it is not tuned, and written as 50.
        tuning_sparsity: float `[heads]`: the share of blocks left out while tuning.

    Args:
        sim_rule: What bounds the error: "l1", "cosine" or "rmse".
        l1: The largest relative L1 of a head's output.
        pv_l1: As in the original above `l1`; its bound on what `pvthreshd` skips.
        cos_sim: The least cosine similarity.
        rmse: The largest root of the mean square error.
        rearrange_kwargs: Kept for callers; of no effect, as in the original.
        tune_pv: Of no effect: nothing is skipped.

    Raises:
        ValueError: for bounds that cannot be.

    Source: the class of that name of SpargeAttn, https://arxiv.org/abs/2502.18137. `PARALLEL_TUNE` of its environment
    spreads heads over GPUs; here they are tuned one after another whatever it says.
    """

    is_sparse: Optional[Tensor]
    cdfthreshd: Optional[Tensor]
    simthreshd1: Optional[Tensor]
    simthreshd2: Optional[Tensor]
    pvthreshd: Optional[Tensor]
    tuning_sparsity: Optional[Tensor]

    def __init__(
        self,
        sim_rule: str = "l1",
        l1: float = 0.07,
        pv_l1: float = 0.08,
        cos_sim: float = 0.98,
        rmse: float = 0.07,
        rearrange_kwargs: Optional[dict[str, Any]] = None,
        tune_pv: bool = True,
    ) -> None:
        super().__init__()
        if not pv_l1 > l1:
            raise ValueError(f"pv_l1: value is {pv_l1}, expected more than l1, which is {l1}")
        self._rule = Rule(sim_rule, l1, cos_sim, rmse)
        self._rule.check()
        self.sim_rule, self.l1, self.pv_l1, self.cos_sim, self.rmse = sim_rule, l1, pv_l1, cos_sim, rmse
        self.rearrange_kwargs = {} if rearrange_kwargs is None else rearrange_kwargs
        self.tune_pv = tune_pv
        self.head_num: Optional[int] = None
        self._predictor: Optional[Predictor] = None
        for name in _THRESHOLDS:
            self.register_parameter(name, None)
        self._start_again(None, None)

    def _start_again(self, head_num: Optional[int], device: Any) -> None:
        """Forgets what calls have been tuned on."""
        self.tuning_sparsity = None if head_num is None else torch.zeros(head_num, device=device)
        self.num_data_passed = 0
        self.hyperparams_cache: dict[int, list[Point]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _THRESHOLDS and value is not None and not isinstance(value, nn.Parameter):
            value = nn.Parameter(torch.as_tensor(value).detach().clone(), requires_grad=False)
        super().__setattr__(name, value)
        if name in _THRESHOLDS and self.cdfthreshd is not None and self.simthreshd1 is not None:
            # Read now for compiled graphs, which cannot; unless the others are yet to come.
            tensors = [getattr(self, threshold) for threshold in _THRESHOLDS[:3]]
            shapes = {x.shape for x in tensors if x is not None and x.ndim}
            if len(shapes) <= 1:
                self._refresh()

    def init_hyperparams(self, head_num: int, device: Any) -> None:
        """Thresholds for so many heads, as tuning starts from."""

        def full(value: Any) -> Tensor:
            return torch.full((head_num,), value, device=device)

        self.head_num = head_num
        self.is_sparse = full(True)
        self.cdfthreshd, self.simthreshd1, self.simthreshd2 = full(0.1), full(-1.0), full(0.0)
        self.pvthreshd = full(_PVTHRESHD)
        self._start_again(head_num, device)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Optional[Tensor] = None,
        is_causal: bool = False,
        scale: Optional[float] = None,
        tensor_layout: str = "HND",
        tune_mode: bool = False,
        smooth_k: bool = True,
        return_sparsity: bool = False,
    ) -> Any:
        """Attention: of all blocks while tuning, then of those that the thresholds keep.

        Args:
            q: `[batch, heads, q_len, head_dim]` ("HND") or `[batch, q_len, heads, head_dim]` ("NHD").
            k: As q, with heads that divide q's, and any length.
            v: As k.
            mask: Bool or additive, broadcastable to `[batch, heads, q_len, kv_len]`.
            is_causal: Whether a query sees no later key; aligned top-left.
            scale: Factor on QKᵀ; `1 / sqrt(head_dim)` when None.
            tensor_layout: "HND" or "NHD".
            tune_mode: Whether to tune.
            smooth_k: Whether K's mean is subtracted, in the prediction and before quantising.
            return_sparsity: Whether to return the share of blocks left out as well; while tuning, the mean over heads.

        Returns:
            The output in q's shape and dtype; with `return_sparsity` a pair of it and a number.

        Raises:
            RuntimeError: if there are no thresholds yet.
            ValueError, TypeError, NotImplementedError, MemoryError: as `sageattention.core` says.
        """
        if q.ndim != 4:
            raise ValueError(f"q: shape is {list(q.shape)}, expected [batch, heads, seq, head_dim], or as NHD has it")
        refuse_derivatives(q=q, k=k, v=v, mask=mask)
        if tune_mode or os.environ.get("TUNE_MODE", "") != "":
            return self._tune(q, k, v, mask, is_causal, scale, tensor_layout, smooth_k, return_sparsity)
        if not torch.compiler.is_compiling():
            self._refresh()
        if self._predictor is None:
            raise RuntimeError(
                "cdfthreshd, simthreshd1: values are None, expected thresholds: tune them first (tune_mode=True), or "
                "load them"
            )
        asked = request(
            tensor_layout,
            is_causal,
            scale,
            causal_alignment="top_left",
            scheme=scheme_on(q, "sparge-int8-fp8"),
            nearest=True,
            smooth_k=smooth_k,
        )
        return predicted(q, k, v, self._predictor, asked, mask, True, None, return_sparsity, False)

    @torch.no_grad()
    def _tune(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Optional[Tensor],
        is_causal: bool,
        scale: Optional[float],
        tensor_layout: str,
        smooth_k: bool,
        return_sparsity: bool,
    ) -> Any:
        if tensor_layout == "NHD":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        heads = q.shape[1]
        if self.is_sparse is None or self.tuning_sparsity is None:
            self.init_hyperparams(heads, q.device)
        assert self.is_sparse is not None and self.tuning_sparsity is not None
        if self.is_sparse.numel() != heads:
            raise ValueError(f"q: number of heads is {heads}, expected {self.is_sparse.numel()}, as were tuned before")
        outputs = []
        for head in range(heads):
            tuner = HeadTuner(q, k, v, mask, head, is_causal, scale, smooth_k, self._rule)
            outputs.append(tuner.wanted)
            if bool(self.is_sparse[head]):
                points = tuner.points(self.num_data_passed)
                self.hyperparams_cache[head] = points + self.hyperparams_cache.get(head, [])
                self._fill(head, chosen(self.hyperparams_cache[head]))
        self.num_data_passed += 1
        self._refresh()
        sparsity = self.tuning_sparsity.mean().item()
        _log.info("SparseAttentionMeansim: tuned on %d calls, mean sparsity %.3f", self.num_data_passed, sparsity)
        out = torch.cat(outputs, dim=1)
        if tensor_layout == "NHD":
            out = out.transpose(1, 2)
        return (out, sparsity) if return_sparsity else out

    def _fill(self, head: int, point: Point) -> None:
        """Sets a head's thresholds."""
        assert self.is_sparse is not None and self.tuning_sparsity is not None
        assert self.cdfthreshd is not None and self.simthreshd1 is not None
        sparse = point.sparsity > _LEAST_SPARSITY
        self.is_sparse[head] = sparse
        self.tuning_sparsity[head] = point.sparsity
        self.cdfthreshd[head] = point.cdfthreshd if sparse else 1.0
        self.simthreshd1[head] = point.simthreshd1 if sparse else 1.0

    def _refresh(self) -> None:
        """Reads the thresholds to the host. A change in place leaves no trace that could be asked for without."""
        if self.cdfthreshd is None or self.simthreshd1 is None:
            self._predictor = None
            return
        tensors = {name: getattr(self, name) for name in _THRESHOLDS[:3] if getattr(self, name) is not None}
        for name, x in tensors.items():
            if x.ndim and self.cdfthreshd.ndim and x.shape != self.cdfthreshd.shape:
                wanted = list(self.cdfthreshd.shape)
                raise ValueError(f"{name}: shape is {list(x.shape)}, expected {wanted}, as cdfthreshd")
        values = {name: x.detach().float().cpu() for name, x in tensors.items()}
        dense = values.get("is_sparse", torch.ones(())) == 0
        self._predictor = Predictor.sparge_attn(
            simthreshd1=torch.where(dense, 1.0, values["simthreshd1"]),
            cdfthreshd=torch.where(dense, 1.0, values["cdfthreshd"]),
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in _THRESHOLDS:
            saved = state_dict.get(prefix + name)
            if saved is not None and getattr(self, name) is None:
                setattr(self, name, torch.zeros_like(saved, dtype=torch.bool if name == "is_sparse" else None))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._refresh()


def extract_sparse_attention_state_dict(model: nn.Module, verbose: bool = False) -> dict[str, Tensor]:
    """The entries of a model's state that are thresholds of its `SparseAttentionMeansim`s, to be saved by `torch.save`.

    Args:
        model: A model with such modules in it, or one itself.
        verbose: Whether to log their names.
    """
    saved: dict[str, Tensor] = {}
    state = model.state_dict()
    for prefix, _ in _sparse_modules(model):
        for name in _THRESHOLDS:
            if prefix + name in state:
                saved[prefix + name] = state[prefix + name]
                if verbose:
                    _log.info("saved: %s", prefix + name)
    return saved


def load_sparse_attention_state_dict(
    model: nn.Module, saved_state_dict: dict[str, Tensor], multigpu: bool = False, verbose: bool = False
) -> nn.Module:
    """Gives a model's `SparseAttentionMeansim`s the thresholds that `extract_sparse_attention_state_dict` returned,
    here or in the original.

    Args:
        model: The model, its modules tuned before or not.
        saved_state_dict: Thresholds by name; names that are none of its modules' are passed over.
        multigpu: Whether the model lies on several devices, so that thresholds go to the current GPU, where there is
            one, and not to the model's device.
        verbose: Whether to log the names of thresholds.

    Returns:
        The model.
    """
    device = next((parameter.device for parameter in model.parameters()), None)
    if multigpu:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    for prefix, module in _sparse_modules(model):
        for name in _THRESHOLDS:
            saved = saved_state_dict.get(prefix + name)
            if saved is None:
                continue
            # The original's files may have flags as numbers, and thresholds in the model's dtype.
            dtype = torch.bool if name == "is_sparse" else torch.float32
            setattr(module, name, saved.to(device=saved.device if device is None else device, dtype=dtype))
            if verbose:
                _log.info("loaded: %s", prefix + name)
    return model


def _sparse_modules(model: nn.Module) -> list[tuple[str, SparseAttentionMeansim]]:
    """Such modules of a model, each with what the names of its thresholds begin with."""
    return [
        (f"{name}." if name else "", module)
        for name, module in model.named_modules()
        if isinstance(module, SparseAttentionMeansim)
    ]
