"""What a quantised cache hands out in place of keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class CachedTensor(Tensor):
    """Stands for the keys or the values of a layer: their shape, dtype and device. There are no numbers to be had."""

    layer: Any

    @staticmethod
    def __new__(cls, layer: Any, shape: tuple[int, ...], like: Tensor) -> "CachedTensor":
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        self.layer = layer
        return self

    def __repr__(self, **_: Any) -> str:
        return f"CachedTensor(shape={list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(
            f"past_key_values: keys and values of a sageattention cache are quantised, expected to be read by "
            f'attn_implementation="sage" (register_transformers) alone, not by {func}'
        )
