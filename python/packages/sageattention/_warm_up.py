"""Compiling what calls need before they are made."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Optional

from sageattention import _native, _values
from sageattention._keywords import callers_keywords, shown
from sageattention._request import native_options, request

_LOG = logging.getLogger("sageattention")


class WarmedKernel(NamedTuple):
    """A kernel that calls need, and what loading it took."""

    name: str
    """Its name."""
    origin: str
    """Who compiled it: "compiled" is this process, "disk" an earlier one; "driver" leaves it open, as the driver has a
    cache of its own; and "loaded" says that this process had it already."""
    ms: float
    """Milliseconds that it took to write it, to compile or find it, and to load it."""


@callers_keywords
def warm_up(
    shapes: Iterable[Any],
    dtype: Any = "bfloat16",
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: Optional[float] = None,
    return_lse: bool = False,
    attn_mask: Any = None,
    *,
    cu_seqlens_q: Optional[Sequence[int]] = None,
    cu_seqlens_k: Optional[Sequence[int]] = None,
    predictor: Any = None,
    pooled_tail: bool = False,
    smoothing: bool = True,
    scheme: Optional[str] = None,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    sinks: bool = False,
    kv_lens: bool = False,
    device: Any = None,
    **kwargs: Any,
) -> list[WarmedKernel]:
    """Compiles and loads the kernels of calls that are to come, those of all shapes side by side, without tensors.

        sageattention.warm_up([(1, 24, 4608, 128)])
        sageattention.warm_up([((8, 32, 1, 128), (8, 8, 4096, 128))], torch.float16, is_causal=True)

    Calls of this process compile nothing from there on, and later processes of the same GPU and driver find on disk
    what is kept there; where the driver keeps nothing, the log `sageattention` says so.

    Options are those of the calls to come, and mean what they mean in `sageattn`, `sageattn_varlen` and
    `sageattention.sparse.sparse_attention`. For calls under `sageattention.patch()` say
    `causal_alignment="top_left"`, as torch has it. Tensors are taken to be without gaps and to begin at multiples of 16
    bytes.

    Args:
        shapes: For each call the shape of q, or the shapes (q, k) or (q, k, v), where those differ.
        dtype: The tensors' dtype, or its name: float16 or bfloat16.
        tensor_layout: "HND" or "NHD".
        is_causal: Whether a query sees no later key.
        sm_scale: Factor on QKᵀ, above 0; `1 / sqrt(head_dim)` when None.
        return_lse: Whether calls return the log-sum-exp.
        attn_mask: (shape, dtype) of the calls' mask, or what has both, such as a tensor on torch's "meta" device.
        cu_seqlens_q: Boundaries of packed sequences, such as calls have: shapes are then `[total, heads, head_dim]`.
        cu_seqlens_k: As cu_seqlens_q, which it is when None.
        predictor: A `sageattention.sparse.Predictor`.
        pooled_tail: As in `sparse_attention`.
        smoothing: As in `sageattn`.
        scheme: The name of a scheme, in place of the device's choice.
        causal_alignment: "bottom_right" or "top_left".
        window: (left, right): keys further before or after the diagonal are hidden; None or -1 is no limit.
        logit_softcap: Scaled scores s become `softcap * tanh(s / softcap)`; None or 0 leaves them.
        sinks: Whether calls have attention sinks.
        kv_lens: Whether calls have lengths of keys.
        device: "cuda", "cuda:N", N or a torch.device; torch's current GPU when None. "cpu" has nothing to compile.

    Returns:
        The kernels, each once; none for a CPU.

    Raises:
        ValueError, TypeError, NotImplementedError: what is wrong with a shape or an option; the message begins with the
            shape's place among `shapes`.
        RuntimeError: without a GPU, or if its driver fails.
    """
    asked = request(
        tensor_layout,
        is_causal,
        sm_scale,
        causal_alignment=causal_alignment,
        window=window,
        logit_softcap=logit_softcap,
        scheme=scheme,
        smooth_k=_values.flag("smoothing", smoothing),
        pooled_tail=pooled_tail,
    )
    options = native_options(asked)
    return_lse = _values.flag("return_lse", return_lse)
    has_sinks, has_kv_lens = _values.flag("sinks", sinks), _values.flag("kv_lens", kv_lens)
    name = _dtype_name("dtype", dtype)
    calls = [_shapes(f"shapes[{index}]", shape) for index, shape in enumerate(shapes)]
    mask = None if attn_mask is None else _mask(attn_mask)
    packed = None
    if cu_seqlens_q is not None:
        boundaries = _values.boundaries("cu_seqlens_q", cu_seqlens_q)
        keys = boundaries if cu_seqlens_k is None else _values.boundaries("cu_seqlens_k", cu_seqlens_k)
        packed = (boundaries, keys)
    elif cu_seqlens_k is not None:
        raise ValueError("cu_seqlens_q: value is None, expected boundaries, as cu_seqlens_k is given")
    if packed is not None and has_kv_lens:
        raise ValueError("kv_lens: value is True, expected False, as cu_seqlens_k has the lengths of packed keys")
    ordinal = _ordinal(device)
    if ordinal is None:
        return []
    warming = _native.WarmUp(ordinal)
    for index, (q, k, v) in enumerate(calls):
        tensors = (_tensor(q, name), _tensor(k, name), _tensor(v, name))
        try:
            given = _predictor(predictor, q, tensor_layout, packed is not None)
            heads = _sinks(q, tensor_layout) if has_sinks else None
            warming.note(*tensors, options, return_lse, mask, packed, given, heads, has_kv_lens)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise type(error)(f"shapes[{index}]: {error}") from None
    kernels = [WarmedKernel(*kernel) for kernel in warming.load()]
    reason = _native.driver_forgets() if any(kernel.origin == "driver" for kernel in kernels) else None
    if reason is not None:
        _LOG.warning(
            "the driver's cache: %s; some kernels are compiled anew in every process, unless CUDA_CACHE_PATH names a "
            "folder that can be written before CUDA starts",
            reason,
        )
    return kernels


def arrange_driver_cache() -> None:
    """Names a folder for the driver's cache of compiled kernels where its own cannot be written, as in a container
    whose home is read-only: beside our own. It is of use before CUDA starts, and for processes that this one starts."""
    folder = _native.driver_cache_folder()
    if folder is not None:
        os.environ.setdefault("CUDA_CACHE_PATH", os.fspath(folder))


def _shapes(name: str, value: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The shapes of q, k and v."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: value is {shown(value)}, expected the shape of q, or the shapes (q, k) or (q, k, v)")
    if not value or not isinstance(value[0], Sequence):
        q = _shape(name, value)
        return (q, q, q)
    if len(value) not in (2, 3):
        raise ValueError(f"{name}: value is {shown(value)}, expected the shape of q, or the shapes (q, k) or (q, k, v)")
    given = [_shape(f"{name}[{place}]", shape) for place, shape in enumerate(value)]
    return (given[0], given[1], given[-1])


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: value is {shown(value)}, expected a shape, such as (1, 8, 1024, 64)")
    sizes = tuple(_values.integer(f"{name}[{place}]", size) for place, size in enumerate(value))
    if any(not 0 <= size <= _values.FARTHEST for size in sizes):
        raise ValueError(f"{name}: value is {shown(value)}, expected sizes of 0 to {_values.FARTHEST}")
    return sizes


def _tensor(shape: tuple[int, ...], dtype: str) -> _native.Tensor:
    """A tensor without gaps, for the Rust module."""
    strides = tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))
    return (0, shape, strides, dtype)


def _sinks(q: tuple[int, ...], tensor_layout: str) -> _native.Tensor:
    """Attention sinks, one for each of q's heads: of packed and of NHD tensors the dimension before the last."""
    heads = q[-2] if len(q) == 3 or tensor_layout == "NHD" else q[-3] if len(q) > 2 else 0
    return _tensor((heads,), "float32")


def _mask(value: Any) -> _native.Tensor:
    """A mask, given by its shape and dtype."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None and isinstance(value, Sequence) and len(value) == 2:
        shape, dtype = value
    if shape is None or dtype is None:
        raise TypeError(f"attn_mask: value is {shown(value)}, expected (shape, dtype), or a tensor")
    return _tensor(_shape("attn_mask", tuple(shape)), _dtype_name("attn_mask", dtype))


def _dtype_name(name: str, value: Any) -> str:
    """A dtype of any library by its name."""
    text = value if isinstance(value, str) else getattr(value, "__name__", None) or str(value)
    found = text.rpartition(".")[2]
    if value is None or not found.isidentifier():
        raise TypeError(f"{name}: value is {shown(value)}, expected a dtype, or its name")
    return found


def _predictor(predictor: Any, q: tuple[int, ...], tensor_layout: str, packed: bool) -> Optional[_native.Predictor]:
    if predictor is None:
        return None
    from sageattention._predictor import fields, native_predictor

    return native_predictor(tuple(fields(predictor, SimpleNamespace(shape=q), tensor_layout, packed)))


def _ordinal(device: Any) -> Optional[int]:
    """The number of a GPU; None for the CPU."""
    if device is not None and not isinstance(device, str) and not hasattr(device, "type"):
        return _number(device, _values.integer("device", device))
    text = "cuda" if device is None else str(device)
    kind, _, number = text.partition(":")
    if kind == "cpu":
        return None
    if kind != "cuda" or (number and not number.isdecimal()):
        raise ValueError(f"device: value is {shown(device)}, expected cuda, cuda:N, N, or cpu")
    if number:
        return _number(device, int(number))
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_available() else 0


def _number(device: Any, number: int) -> int:
    if 0 <= number < _values.FARTHEST:
        return number
    raise ValueError(f"device: value is {shown(device)}, expected the number of a GPU, from 0 on")
