"""Whether installed wheels compute: attention of numpy arrays, ours and the shims', against softmax in float64.

    python3 scripts/smoke.py

Needs numpy. Exits with 1, and says by how much, where a result is not right.
"""

import sys

import numpy
import sageattention
import spas_sage_attn
from sageattention import _native, sageattn


def exact(q, k, v):
    q, k, v = (x.astype(numpy.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    scores -= scores.max(axis=-1, keepdims=True)
    weights = numpy.exp(scores)
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def main():
    random = numpy.random.default_rng(0)
    q, k, v = (random.standard_normal((1, 4, 300, 64), dtype=numpy.float32) for _ in range(3))
    wanted = exact(q, k, v)
    print(sageattention.__version__, sys.version.split()[0], sys.platform, _native.backend_description())
    wrong = False
    # Measured on AVX-512: 0.008 and 0.012; the bound is twice the larger.
    for name, out in (
        ("sageattn", sageattn(q, k, v)),
        ("spas_sage_attn", spas_sage_attn.spas_sage_attn_meansim_topk_cuda(q, k, v, topk=1.0)),
    ):
        error = abs(out - wanted).sum() / abs(wanted).sum()
        print(f"{name}: {out.dtype} {out.shape}, relative L1 {error:.4f}")
        wrong |= not error < 0.024
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
