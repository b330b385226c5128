"""Hugging Face transformers: a cache whose keys and values stay quantised."""

from __future__ import annotations

import functools
import weakref
from typing import Any, Optional

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from sageattention._cached_tensor import CachedTensor
from sageattention._torch_inputs import autocast
from sageattention.kv_cache import KvCache


class SageCache(Cache):
    """See `plug_in.transformers_cache`."""

    def __init__(self, **options: Any) -> None:
        masks = _Masks()
        super().__init__(layer_class_to_replicate=functools.partial(SageLayer, masks, options))

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' pages that were ever needed at once; on a GPU those of their pools."""
        return sum(layer.nbytes for layer in self.layers)


class SageLayer(CacheLayerMixin):
    """The cache of one layer.

    New tokens are appended when attention comes to them: only then it is known which of a prompt's are padding. Those
    are left out, so that sequences of a batch have lengths of their own.
    """

    is_sliding = False
    is_croppable = True
    keys: Any
    values: Any

    def __init__(self, masks: "_Masks", options: dict[str, Any]) -> None:
        super().__init__()
        self._masks = masks
        self._options = options
        self._cache: Optional[KvCache] = None
        # Keys and values that are still to be appended.
        self._new: Optional[tuple[Tensor, Tensor]] = None
        self._forget()

    def _forget(self) -> None:
        # Tokens of a sequence, padding included.
        self._seen = 0
        # The sequence of the cache that each row of the batch is, and its tokens of padding.
        self._rows: list[int] = []
        self._padding: list[int] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        options = self._options
        self._cache = KvCache(
            heads,
            head_dim,
            sequences=batch,
            keys=options["keys"],
            values=options["values"],
            page_size=options["page_size"],
            max_tokens=options["max_cache_len"],
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append()
        if not self._rows:
            self._rows = list(range(key_states.shape[0]))
        if key_states.shape[0] != len(self._rows):
            raise ValueError(f"batch: value is {key_states.shape[0]}, expected {len(self._rows)}, as the cache")
        self._new = autocast(key_states, value_states)
        self._seen += key_states.shape[2]
        self.keys, self.values = (
            CachedTensor(self, (*x.shape[:2], self._seen, x.shape[3]), x) for x in (key_states, value_states)
        )
        return self.keys, self.values

    def attend(
        self,
        query: Tensor,
        mask: Optional[Tensor],
        *,
        causal: bool,
        scaling: Optional[float],
        sliding_window: Optional[int],
        softcap: Optional[float],
        sinks: Optional[Tensor],
    ) -> Tensor:
        """Attention of `[batch, heads, q_len, head_dim]` over everything seen."""
        (query,) = autocast(query)
        window = None
        if mask is not None:
            known = self._padding if self._padding else None
            padding, window = self._masks.read(mask, query.shape[2], known, sliding_window)
            if padding is not None:
                self._append(padding * len(self._rows) if len(padding) == 1 else padding)
                # What the mask hides is left out, or behind the diagonal and the window.
                mask, causal = None, True
            elif any(self._padding):
                raise NotImplementedError(
                    "attention_mask: a mask that is not causal with left padding and a sliding window, expected one "
                    "that is: padding was left out of the cache"
                )
            else:
                causal = False
        elif any(self._padding):
            raise NotImplementedError(
                "attention_mask: value is None, expected the mask of the padding that was left out of the cache"
            )
        self._append()
        assert self._cache is not None
        return self._cache.attend(
            query,
            causal,
            scaling,
            attn_mask=mask,
            sequences=self._rows,
            window=window,
            logit_softcap=softcap,
            sinks=sinks,
        )

    def _append(self, padding: Optional[list[int]] = None) -> None:
        """Appends the new tokens, of a prompt without so many of padding."""
        if self._new is None:
            return
        (keys, values), self._new = self._new, None
        first = not self._padding
        if first:
            self._padding = padding or [0] * len(self._rows)
        assert self._cache is not None
        if not first or not any(self._padding):
            self._cache.append(keys, values, self._rows)
            return
        for row, (sequence, skipped) in enumerate(zip(self._rows, self._padding)):
            self._cache.append(keys[row : row + 1, :, skipped:], values[row : row + 1, :, skipped:], [sequence])

    @property
    def nbytes(self) -> int:
        """Bytes of all pages that were ever needed at once; on a GPU those of the pool."""
        return 0 if self._cache is None else self._cache.nbytes

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, 0

    def get_seq_length(self) -> int:
        return self._seen

    def get_max_length(self) -> int:
        length = self._options["max_cache_len"]
        return -1 if length is None else length

    def reset(self) -> None:
        self._new = None
        self.keys = self.values = None
        if self._cache is not None:
            self._cache.reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove: value is {tokens_to_remove}, expected 0 or less: the negative number of tokens"
            )
        self._append()
        if tokens_to_remove == 0 or self._cache is None:
            return
        self._seen = max(0, self._seen + tokens_to_remove)
        for sequence, padding in zip(self._rows, self._padding):
            self._cache.truncate(max(0, self._seen - padding), [sequence])
        self._padding = [min(padding, self._seen) for padding in self._padding]
        if self._seen == 0:
            self._padding = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        wanted = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._take(wanted.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1 and self._seen > 0:
            raise NotImplementedError(
                f"repeats: value is {repeats}, expected 1: a sageattention cache has as many sequences as its first "
                "batch; repeat the inputs before the prompt is computed"
            )

    def offload(self) -> None:
        raise NotImplementedError("offloading: value is True, expected False for a sageattention cache")

    def prefetch(self) -> None:
        self.offload()

    def _take(self, rows: list[int]) -> None:
        """Makes the batch that of these rows. A sequence that several take is shared, by pages, from the second on."""
        self._append()
        if self._cache is None or self._seen == 0:
            return
        if len(rows) > len(self._rows):
            raise NotImplementedError(
                f"indices: {len(rows)} rows, expected at most {len(self._rows)}, as many as the cache has"
            )
        taken = [self._rows[row] for row in rows]
        unused = [sequence for sequence in self._rows if sequence not in taken]
        self._padding = [self._padding[row] for row in rows]
        new_rows: list[int] = []
        for sequence in taken:
            if sequence in new_rows:
                free = unused.pop()
                self._cache.truncate(0, [free])
                self._cache.fork(sequence, free)
                sequence = free
            new_rows.append(sequence)
        for sequence in unused:
            self._cache.truncate(0, [sequence])
        self._rows = new_rows


class _Masks:
    """What masks say, read once for all layers that share one: on a GPU that waits for it."""

    def __init__(self) -> None:
        self._read: dict[Any, tuple[Any, Any]] = {}

    def read(
        self, mask: Tensor, q_len: int, padding: Optional[list[int]], sliding_window: Optional[int]
    ) -> tuple[Optional[list[int]], Optional[tuple[int, int]]]:
        """How many tokens of padding each row of the batch begins with, and the window, of a mask that hides nothing
        but these and what is behind the diagonal; (None, None) of any other. `padding` is what is known of it
        already."""
        key = (id(mask), None if padding is None else tuple(padding), sliding_window)
        known = self._read.get(key)
        if known is not None and known[0]() is mask:
            return known[1]
        found = _read(mask, q_len, padding, sliding_window)
        self._read = {key: kept for key, kept in self._read.items() if kept[0]() is not None}
        self._read[key] = (weakref.ref(mask), found)
        return found


def _read(
    mask: Tensor, q_len: int, padding: Optional[list[int]], sliding_window: Optional[int]
) -> tuple[Optional[list[int]], Optional[tuple[int, int]]]:
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != q_len:
        return None, None
    visible, keys = mask[:, 0], mask.shape[3]
    if padding is None:
        # The first key that some query sees; a row of nothing but padding has none.
        seen = visible.any(1)
        first = torch.where(seen.any(1), seen.int().argmax(1), keys)
    else:
        first = torch.tensor(padding, device=mask.device)
    query = torch.arange(keys - q_len, keys, device=mask.device)[:, None]
    key = torch.arange(keys, device=mask.device)
    # Rows of padding are nobody's, whatever they see.
    counts = (query >= first[:, None, None]).expand_as(visible)
    causal = (key <= query) & (key >= first[:, None, None])
    windows: list[Optional[int]] = [None] if sliding_window is None else [sliding_window, None]
    for window in windows:
        wanted = causal if window is None else causal & (key > query - window)
        if torch.equal(visible & counts, wanted & counts):
            left = None if window is None else (window - 1, 0)
            return first.tolist(), left
    return None, None
