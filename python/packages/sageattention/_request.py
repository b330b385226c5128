"""What a call asks for beside its tensors."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional

from sageattention import _native, _values
from sageattention._keywords import shown


class Request(NamedTuple):
    """What a call asks for beside its tensors. An option is a field here, and one of `_native.Options`."""

    tensor_layout: str = "HND"
    is_causal: bool = False
    causal_alignment: str = "bottom_right"
    window_left: Optional[int] = None
    window_right: Optional[int] = None
    sm_scale: Optional[float] = None
    logit_softcap: Optional[float] = None
    scheme: Optional[str] = None
    nearest: bool = False
    smooth_k: bool = True
    pooled_tail: bool = False


@functools.lru_cache(maxsize=1024)
def native_options(request: tuple[Any, ...]) -> _native.Options:
    """A request, or its fields, as the Rust module takes them."""
    return _native.Options(**Request(*request)._asdict())


def request(
    tensor_layout: Any,
    is_causal: Any,
    sm_scale: Any,
    *,
    causal_alignment: Any = "bottom_right",
    window: Any = None,
    logit_softcap: Any = None,
    scheme: Any = None,
    nearest: bool = False,
    smooth_k: Any = True,
    pooled_tail: Any = False,
) -> Request:
    """A request from the public functions' arguments."""
    if not isinstance(tensor_layout, str):
        raise TypeError(
            f"tensor_layout: value is {shown(tensor_layout)}, expected HND or NHD; this function does not have the "
            "positions of torch's scaled_dot_product_attention, for which there is sageattention.patch()"
        )
    if causal_alignment not in ("bottom_right", "top_left"):
        raise ValueError(f"causal_alignment: value is {shown(causal_alignment)}, expected bottom_right or top_left")
    if scheme is not None and not isinstance(scheme, str):
        raise TypeError(f"scheme: value is {shown(scheme)}, expected the name of a scheme, or None")
    left, right = _values.window("window", window)
    # In the fields' order: names would take twice as long.
    return Request(
        tensor_layout,
        _values.flag("is_causal", is_causal),
        causal_alignment,
        left,
        right,
        _values.number("sm_scale", sm_scale),
        _values.softcap("logit_softcap", logit_softcap),
        scheme,
        nearest,
        _values.flag("smooth_k", smooth_k),
        _values.flag("pooled_tail", pooled_tail),
    )


def dense_shape(tensor_layout: str) -> str:
    """The shape of dense tensors of a layout, in words."""
    return "[batch, seq, heads, head_dim]" if tensor_layout == "NHD" else "[batch, heads, seq, head_dim]"


def kv_rows(k: Any, tensor_layout: str) -> Optional[int]:
    """How many keys dense tensors have; None where k is no such tensor, of which the call itself says what is wrong."""
    return k.shape[1 if tensor_layout == "NHD" else 2] if len(getattr(k, "shape", ())) == 4 else None


def check_scheme(scheme: Optional[str]) -> None:
    """Refuses a name that no scheme has.

    Raises:
        ValueError: if there is no such scheme.
    """
    names = [name for name, _ in _native.schemes()]
    if scheme is not None and scheme not in names:
        raise ValueError(f"scheme: value is {shown(scheme)}, expected one of {', '.join(names)}")
