"""A quantised KV cache: decoding without keeping, or reading, keys and values in 16 bits.

    cache = KvCache(num_kv_heads=8, head_dim=128, sequences=2, values="int8")
    cache.append(k, v)            # [sequences, num_kv_heads, tokens, head_dim]: a prompt, then token by token
    out = cache.attend(q)         # [sequences, heads, q_len, head_dim], over everything cached

For Hugging Face transformers there is `sageattention.transformers_cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

from sageattention import _native, _values
from sageattention._frameworks import library_of
from sageattention._keywords import shown
from sageattention._request import dense_shape, native_options, request

_VALUES = {
    "fp16": "f16",
    "f16": "f16",
    "float16": "f16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp8": "fp8-e4m3",
    "fp8-e4m3": "fp8-e4m3",
    "int8": "int8",
}


class KvCache:
    """Keys and values of past tokens, quantised, in pages: INT8 keys with a scale for each token, 16- or 8-bit values.

    Tokens are appended in chunks of any size and never quantised again, and attention reads the codes where they lie.
    A cache of 128 channels a head takes 0.53 times the memory of one in 16 bits with 8-bit values, 0.77 times with
    16-bit ones. Tensors are as `help(sageattention.core)` says; the cache lies where the first of them do, and on a GPU
    all its work is put on the stream that is current then.

    Args:
        num_kv_heads: Heads of keys and values.
        head_dim: Channels of a head, 1 to 256.
        sequences: How many sequences there are; all begin empty, and each has a length of its own.
        keys: "int8".
        values: "fp16", "bf16", "int8" (a scale for each token and head) or "fp8" (E4M3, likewise; GPUs from 8.9 on).
        page_size: Tokens of a page, a power of two from 16 to 1024.
        max_tokens: The most tokens of each sequence. A GPU's memory is taken at once, so that it or max_pages must be
            given there; on a CPU the cache grows as needed without.
        max_pages: In place of it: pages of all sequences together, which share them.
        tensor_layout: "HND", `[batch, heads, seq, head_dim]`, or "NHD", of k, v, q and the output.

    Raises:
        ValueError, TypeError: what is wrong with an option.

    Source: what is stored is defined by `sage_core::oracle::CachedHead` of the Rust crates.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        sequences: int = 1,
        keys: str = "int8",
        values: str = "fp16",
        page_size: int = 64,
        max_tokens: Optional[int] = None,
        max_pages: Optional[int] = None,
        tensor_layout: str = "HND",
    ) -> None:
        if keys != "int8":
            raise ValueError(f"keys: value is {shown(keys)}, expected int8")
        if not isinstance(values, str) or values not in _VALUES:
            raise ValueError(f"values: value is {shown(values)}, expected fp16, bf16, int8 or fp8")
        if tensor_layout not in ("HND", "NHD"):
            raise ValueError(f"tensor_layout: value is {shown(tensor_layout)}, expected HND or NHD")
        self._sequences = _size("sequences", sequences)
        page_size = _size("page_size", page_size)
        if max_tokens is not None:
            if max_pages is not None:
                raise ValueError(f"max_pages: value is {shown(max_pages)}, expected None, as max_tokens is given")
            max_pages = self._sequences * -(-_size("max_tokens", max_tokens) // max(page_size, 1))
        self._layout = tensor_layout
        self._native = _native.KvCache(
            num_kv_heads=_size("num_kv_heads", num_kv_heads),
            head_dim=_size("head_dim", head_dim),
            sequences=self._sequences,
            values=_VALUES[values],
            page_size=page_size,
            max_pages=None if max_pages is None else _size("max_pages", max_pages),
            tensor_layout=tensor_layout,
        )

    def append(self, k: Any, v: Any, sequences: Optional[Sequence[int]] = None) -> None:
        """Appends tokens to sequences, all of them where none are named.

        Args:
            k: `[sequences, num_kv_heads, tokens, head_dim]`, of any strides; float16 or bfloat16, on a CPU float32 too.
            v: As k.
            sequences: The sequence of each entry of the batch; each once.

        Raises:
            ValueError, TypeError, NotImplementedError, RuntimeError: if a tensor does not fit, or there are too few
                pages. The cache is then as it was.
        """
        library = library_of(k, v=v)
        self._native.append(
            self._named(sequences), library.raw("k", k), library.raw("v", v), library.stream(k), library.wait
        )

    def attend(
        self,
        q: Any,
        is_causal: bool = True,
        sm_scale: Optional[float] = None,
        return_lse: bool = False,
        attn_mask: Any = None,
        *,
        sequences: Optional[Sequence[int]] = None,
        window: Optional[tuple[Optional[int], Optional[int]]] = None,
        logit_softcap: Optional[float] = None,
        sinks: Any = None,
    ) -> Any:
        """Attention over what sequences hold. The last query is that of the last cached token, so append first.

        Args:
            q: `[sequences, heads, q_len, head_dim]`, heads a multiple of num_kv_heads.
            is_causal: Whether a query sees no later token.
            sm_scale: Factor on QKᵀ, above 0; `1 / sqrt(head_dim)` when None.
            return_lse: Whether to return (out, float32 `[sequences, heads, q_len]`).
            attn_mask: Bool or additive, broadcastable to `[sequences, heads, q_len, longest]`; on a CPU.
            sequences: The sequence of each entry of q's batch, which may repeat; all in order when None.
            window: (left, right): tokens further before or after the diagonal are hidden; None or -1 is no limit.
            logit_softcap: Scaled scores s become `softcap * tanh(s / softcap)`; None or 0 leaves them.
            sinks: As in `sageattn`.

        Returns:
            The output in q's shape and dtype; a sequence without tokens gives zeros.

        Raises:
            ValueError, TypeError, NotImplementedError, RuntimeError: if q or an option does not fit the cache.
        """
        asked = request(self._layout, is_causal, sm_scale, window=window, logit_softcap=logit_softcap)
        library = library_of(q, attn_mask=attn_mask, sinks=sinks)
        shape = tuple(q.shape)
        if len(shape) != 4:
            raise ValueError(f"q: shape is {list(shape)}, expected {dense_shape(self._layout)}")
        out = library.empty(q, shape, None)
        lse = None
        if _values.flag("return_lse", return_lse):
            heads, rows = (shape[2], shape[1]) if self._layout == "NHD" else (shape[1], shape[2])
            lse = library.empty(q, (shape[0], heads, rows), "float32")
        self._native.attend(
            self._named(sequences),
            library.raw("q", q),
            library.raw("out", out),
            native_options(asked),
            None if lse is None else library.raw("lse", lse),
            None if attn_mask is None else library.raw("mask", attn_mask),
            None if sinks is None else library.raw("sinks", sinks),
            library.stream(q),
            library.wait,
        )
        return out if lse is None else (out, lse)

    def truncate(self, length: int, sequences: Optional[Sequence[int]] = None) -> None:
        """Forgets all but the first `length` tokens of sequences. Waits for a GPU.

        Raises:
            ValueError: if a sequence has fewer tokens.
        """
        for sequence in self._named(sequences):
            self._native.truncate(sequence, _size("length", length))

    def reset(self) -> None:
        """Forgets every token of every sequence; the memory is kept for new ones. Waits for a GPU."""
        self._native.clear()

    def fork(self, source: int, target: int) -> None:
        """Lets the empty sequence `target` begin with all tokens of `source`, in the same pages, which are copied when
        one of them writes there. On a CPU.

        Raises:
            ValueError: if `target` has tokens. NotImplementedError: on a GPU.
        """
        self._native.fork(_size("source", source), _size("target", target))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return self._native.lengths()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages that were ever needed at once; on a GPU those of the pool."""
        return self._native.bytes()

    def __repr__(self) -> str:
        return f"KvCache(lengths={self.lengths}, nbytes={self.nbytes})"

    def _named(self, sequences: Optional[Sequence[int]]) -> Sequence[int]:
        if sequences is None:
            return range(self._sequences)
        return [_size(f"sequences[{place}]", sequence) for place, sequence in enumerate(sequences)]


def _size(name: str, value: Any) -> int:
    number = _values.integer(name, value)
    if not 0 <= number <= _values.FARTHEST:
        raise ValueError(f"{name}: value is {number}, expected 0 to {_values.FARTHEST}")
    return number
