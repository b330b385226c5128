"""What a call asks for beside its tensors, and which keywords may be ignored."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple, Optional

from sageattention import _native

_log = logging.getLogger("sageattention")


class Request(NamedTuple):
    """What a call asks for beside its tensors."""

    tensor_layout: str = "HND"
    causal: Optional[str] = None
    window_left: Optional[int] = None
    window_right: Optional[int] = None
    sm_scale: Optional[float] = None
    logit_softcap: Optional[float] = None
    scheme: Optional[str] = None
    nearest: bool = False
    smooth_k: bool = True


@functools.lru_cache(maxsize=1024)
def native_options(request: Request) -> _native.Options:
    """The request as the Rust module takes it."""
    fields = request._asdict()
    window = (fields.pop("window_left"), fields.pop("window_right"))
    return _native.Options(window=window, **fields)


def request(
    tensor_layout: str,
    is_causal: bool,
    sm_scale: Optional[float],
    *,
    causal_alignment: str = "bottom_right",
    window: Optional[tuple[Optional[int], Optional[int]]] = None,
    logit_softcap: Optional[float] = None,
    scheme: Optional[str] = None,
    nearest: bool = False,
    smooth_k: bool = True,
) -> Request:
    """A request from the public functions' arguments."""
    left, right = window if window is not None else (None, None)
    return Request(
        tensor_layout=tensor_layout,
        causal=causal_alignment if is_causal else None,
        window_left=left,
        window_right=right,
        sm_scale=None if sm_scale is None else float(sm_scale),
        logit_softcap=logit_softcap,
        scheme=scheme,
        nearest=nearest,
        smooth_k=smooth_k,
    )


# Keywords of the functions that ours stand in for, which would change the result, with the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi_slopes": (),
    "attention_mask": (),
    "attn_bias": (),
    "bias": (),
    "block_mask": (),
    "dropout": (0,),
    "dropout_p": (0,),
    "key_padding_mask": (),
    "mask": (),
    "mask_id": (),
    "q_descale": (),
    "k_descale": (),
    "v_descale": (),
    "s_aux": (),
    "scale": (),
    "seqlens_k": (),
    "sinks": (),
    "softcap": (0,),
    "softmax_scale": (),
    "window_size": ((-1, -1), -1),
}


def check_ignored(function: str, keywords: dict[str, Any]) -> None:
    """Lets keywords pass that change nothing; refuses those that would be silently dropped."""
    for name, value in keywords.items():
        if name not in _NEUTRAL or value is None:
            continue
        neutral = _NEUTRAL[name]
        if isinstance(value, (bool, int, float, tuple)) and value in neutral:
            continue
        wanted = " or ".join(str(value) for value in (None, *neutral))
        found = value if isinstance(value, (bool, int, float, str, tuple)) else type(value).__name__
        raise NotImplementedError(f"{name}: value is {found}, expected {wanted}: {function} does not compute it")
