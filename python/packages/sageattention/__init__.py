"""Attention in 8 and 4 bits: a drop-in for scaled dot-product attention.

    from sageattention import sageattn

    out = sageattn(q, k, v, is_causal=True)    # [batch, heads, seq, head_dim]

Tensors are torch's, numpy's, JAX's, CuPy's, or of any library that speaks DLPack; on the CPU or on an NVIDIA GPU. To
accelerate a model without touching it:

    sageattention.patch()                      # torch.nn.functional.scaled_dot_product_attention
    sageattention.register_transformers()      # attn_implementation="sage"
    sageattention.register_diffusers()         # set_attention_backend("sage"), with masks and on many GPUs
    sageattention.counts()                     # what was computed here, what was left to torch and why

Before a server takes its first request:

    sageattention.warm_up([(1, 24, 4608, 128)])   # kernels of such calls are compiled, and kept on disk

`KvCache` keeps keys and values of past tokens in 8 bits, and `transformers_cache` does for transformers' models.

diffusers finds its `sage*` backends by itself; `register_diffusers` lets them take masks and grouped heads, and `patch`
reaches those of its models that call torch's function themselves. `HybridSchedule` changes the scheme from step to step
of a diffusion process.
`sageattention.sparse` computes only the blocks of the scores that are worth it.
Importing this package imports no framework.
"""

from sageattention._schedule import HybridSchedule
from sageattention._tally import Counts
from sageattention._warm_up import WarmedKernel, arrange_driver_cache, warm_up
from sageattention.core import (
    sageattn,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_varlen,
)
from sageattention.kv_cache import KvCache
from sageattention.plug_in import (
    counts,
    patch,
    patched,
    register_diffusers,
    register_flash_attention,
    register_transformers,
    transformers_cache,
    unpatch,
)

__version__ = "3.0.0"

__all__ = [
    "Counts",
    "HybridSchedule",
    "KvCache",
    "WarmedKernel",
    "counts",
    "patch",
    "patched",
    "register_diffusers",
    "register_flash_attention",
    "register_transformers",
    "sageattn",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_varlen",
    "transformers_cache",
    "unpatch",
    "warm_up",
]

arrange_driver_cache()
