"""Attention in 8 and 4 bits: a drop-in for scaled dot-product attention.

    from sageattention import sageattn

    out = sageattn(q, k, v, is_causal=True)    # [batch, heads, seq, head_dim]

Tensors are torch's, numpy's, JAX's, CuPy's, or of any library that speaks DLPack; on the CPU or on an NVIDIA GPU. To
accelerate a model without touching it:

    sageattention.patch()                      # torch.nn.functional.scaled_dot_product_attention
    sageattention.register_transformers()      # attn_implementation="sage"

diffusers finds its `sage*` backends by itself. Importing this package imports no framework.
"""

from sageattention.core import (
    sageattn,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_varlen,
)
from sageattention.plug_in import Counts, counts, patch, patched, register_transformers, unpatch

__version__ = "3.0.0"

__all__ = [
    "Counts",
    "counts",
    "patch",
    "patched",
    "register_transformers",
    "sageattn",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_varlen",
    "unpatch",
]
