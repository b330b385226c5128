"""xDiT (xfuser) and its yunchang by their own code, where they are installed: `pip install xfuser`."""

import pytest
import torch
import torch.distributed as dist
from exact import TOLERANCE, assert_close, assert_lse_close, attention, local, qkv
from spas_sage_attn.autotune import SparseAttentionMeansim

# The names of yunchang's attention types that are ours to compute.
TYPES = ["SAGE_AUTO", "SAGE_FP16", "SAGE_FP16_TRITON", "SAGE_FP8", "SAGE_FP8_SM90"]


def installed(module):
    """A module of theirs; without it, or without what it needs itself, the test is skipped and says so."""
    return pytest.importorskip(module, exc_type=ImportError)


def nhd(device, head_dim=64):
    dtype = torch.float16 if device == "cuda" else torch.float32
    return qkv(2, 4, 4, 100, 100, head_dim, layout="NHD", dtype=dtype, device=device)


@pytest.fixture
def alone(tmp_path):
    """Groups of this process alone, as a ring and as Ulysses."""
    globals_of_yunchang = installed("yunchang.globals")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/peers", rank=0, world_size=1)
    globals_of_yunchang.set_seq_parallel_pg(1, 1, 0, 1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", TYPES)
def test_a_ring_of_yunchang_s(device, name, causal):
    """Both steps of a ring of two, put together by its own code."""
    if device == "cuda" and "FP8" in name and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    kernels, utils = installed("yunchang.kernels"), installed("yunchang.ring.utils")
    step = kernels.select_flash_attn_impl(kernels.AttnType[name], stage="fwd-only")
    q, k, v = nhd(device)
    # The second half of the queries: of the keys they see the first half whole, and the second as a causal mask has it.
    rows, (k0, k1), (v0, v1) = q[:, 50:].contiguous(), k.split(50, 1), v.split(50, 1)
    options = {"dropout_p": 0.0, "softmax_scale": 64**-0.5, "window_size": (-1, -1), "softcap": 0.0}
    options.update(alibi_slopes=None, return_softmax=False)
    out, lse = None, None
    for keys, values, diagonal in ((k1, v1, causal), (k0, v0, False)):
        part = step(rows, keys, values, causal=diagonal, **options)
        out, lse = utils.update_out_and_lse(out, lse, *part)
    wanted, wanted_lse = attention(rows, k, v, layout="NHD", causal="bottom_right" if causal else None)
    assert_close(out, wanted, TOLERANCE["fp8"])
    assert_lse_close(lse.squeeze(-1).transpose(1, 2), wanted_lse)


@pytest.mark.parametrize("name", TYPES)
def test_yunchang_s_layer(device, alone, name):
    if device == "cuda" and "FP8" in name and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    hybrid, kernels = installed("yunchang.hybrid.attn_layer"), installed("yunchang.kernels")
    layer = hybrid.LongContextAttention(ring_impl_type="basic", attn_type=kernels.AttnType[name])
    q, k, v = nhd(device)
    for causal in (False, True):
        wanted, _ = attention(q, k, v, layout="NHD", causal="bottom_right" if causal else None)
        assert_close(layer(q, k, v, causal=causal), wanted, TOLERANCE["fp8"])


def test_yunchang_s_layer_over_blocks(device, alone):
    """SpargeAttn's module as a processor, which yunchang knows by its class."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    hybrid, kernels = installed("yunchang.hybrid.attn_layer"), installed("yunchang.kernels")
    processor = SparseAttentionMeansim()
    processor.init_hyperparams(4, device)
    layer = hybrid.LongContextAttention(attn_type=kernels.AttnType.SPARSE_SAGE, attn_processor=processor)
    dtype = torch.float16 if device == "cuda" else torch.float32
    q, k, v = local(1, 4, 4, 400, 400, 64, layout="NHD", dtype=dtype, device=device)
    processor.cdfthreshd = torch.full((4,), 1.0, device=device)
    assert_close(layer(q, k, v), attention(q, k, v, layout="NHD")[0], TOLERANCE["fp8"], "all blocks")
    processor.cdfthreshd = torch.full((4,), 0.5, device=device)
    wanted, left_out = processor(q, k, v, tensor_layout="NHD", return_sparsity=True)
    assert left_out > 0.1 and torch.equal(layer(q, k, v), wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_xfuser_s_attention(device, causal):
    usp = installed("xfuser.model_executor.layers.usp")
    backends = installed("xfuser.core.distributed.attention_backend")
    q, k, v = (x.transpose(1, 2) for x in nhd(device))
    sage = backends.AttentionBackendType.SAGE
    wanted, wanted_lse = attention(q, k, v, causal="bottom_right" if causal else None)
    assert_close(usp.attention(q, k, v, is_causal=causal, backend=sage), wanted, TOLERANCE["fp16"])
    # What its ring merges the steps by.
    step = backends.ATTENTION_FUNCTION_REGISTRY[sage]
    out, lse = step(q, k, v, dropout_p=0.0, is_causal=causal)
    assert_close(out, wanted, TOLERANCE["fp16"])
    assert_lse_close(lse, wanted_lse)
