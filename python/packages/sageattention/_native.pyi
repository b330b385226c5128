"""The Rust module: raw addresses in, exceptions out."""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Optional, Union

# Address, shape, strides in elements, name of the dtype; or a DLPack capsule; or a tensor of torch's.
Tensor = Union[tuple[int, tuple[int, ...], tuple[int, ...], str], Any]

class Options:
    def __init__(
        self,
        *,
        tensor_layout: str,
        is_causal: bool,
        causal_alignment: str,
        window_left: Optional[int],
        window_right: Optional[int],
        sm_scale: Optional[float],
        logit_softcap: Optional[float],
        scheme: Optional[str],
        nearest: bool,
        smooth_k: bool,
        pooled_tail: bool,
    ) -> None: ...

class Predictor:
    def __init__(
        self,
        *,
        select: str,
        threshold: Sequence[float],
        topp: Sequence[float],
        num_blocks: int,
        block_q: int,
        block_k: int,
        predict_smooth_k: bool,
        simthreshd1: Optional[Sequence[float]],
        sink_blocks: Sequence[int],
        original_tails: bool,
        q_padding: Optional[Sequence[int]],
        k_padding: Optional[Sequence[int]],
    ) -> None: ...

class KvCache:
    def __init__(
        self,
        *,
        num_kv_heads: int,
        head_dim: int,
        sequences: int,
        values: str,
        page_size: int,
        max_pages: Optional[int],
        tensor_layout: str,
    ) -> None: ...
    def append(
        self,
        sequences: Sequence[int],
        k: Tensor,
        v: Tensor,
        stream: Optional[tuple[int, int]] = None,
        wait: bool = False,
    ) -> None: ...
    def attend(
        self,
        sequences: Sequence[int],
        q: Tensor,
        out: Tensor,
        options: Options,
        lse: Optional[Tensor] = None,
        mask: Optional[Tensor] = None,
        sinks: Optional[Tensor] = None,
        stream: Optional[tuple[int, int]] = None,
        wait: bool = False,
    ) -> None: ...
    def truncate(self, sequence: int, len: int) -> None: ...
    def clear(self) -> None: ...
    def fork(self, source: int, to: int) -> None: ...
    def lengths(self) -> list[int]: ...
    def bytes(self) -> int: ...

class WarmUp:
    def __init__(self, ordinal: int) -> None: ...
    def note(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        lse: bool = False,
        mask: Optional[Tensor] = None,
        packed: Optional[tuple[Sequence[int], Sequence[int]]] = None,
        predictor: Optional[Predictor] = None,
        sinks: Optional[Tensor] = None,
        kv_lens: bool = False,
    ) -> None: ...
    def load(self) -> list[tuple[str, str, float]]: ...

def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    options: Options,
    lse: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    block_mask: Optional[tuple[Tensor, int, int]] = None,
    packed: Optional[tuple[int, int, int, int, int]] = None,
    stream: Optional[tuple[int, int]] = None,
    wait: bool = False,
    predictor: Optional[Predictor] = None,
    map: Optional[Tensor] = None,
    sinks: Optional[Tensor] = None,
    kv_lens: Optional[Tensor] = None,
) -> None: ...
def computes_channels(head_dim: int, value_dim: int, gpu: Optional[int] = None) -> bool: ...
def predict(
    q: Tensor,
    k: Tensor,
    map: Tensor,
    options: Options,
    predictor: Predictor,
    stream: Optional[tuple[int, int]] = None,
    wait: bool = False,
    kv_lens: Optional[Tensor] = None,
) -> None: ...
def driver_cache_folder() -> Optional[PathLike[str]]: ...
def driver_forgets() -> Optional[str]: ...
def backend_description() -> str: ...
def schemes() -> list[tuple[str, str]]: ...
