"""torch's scaled_dot_product_attention, replaced: all its arguments, and its own answer where ours would not do."""

import logging

import pytest
import sageattention
import torch
import torch.nn.functional as F
from exact import TOLERANCE, assert_close, int8_scheme, qkv, random, relative_l1

torch_sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def counted():
    sageattention.counts(reset=True)
    yield
    sageattention.unpatch()


def close(found, wanted, label=""):
    # torch's own answer, in its dtype: as near as the exact one.
    assert_close(found, wanted.double(), TOLERANCE["fp16"] + 2**-8, label)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_argument(device, dtype):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("float32 on a GPU falls back, tested by itself")
    q, k, v = qkv(2, 4, 4, 100, 140, 64, dtype=dtype, device=device)
    grouped = qkv(2, 4, 2, 100, 140, 64, dtype=dtype, device=device)
    visible = random(2, 1, 100, 140, seed=5, device=device) > -0.5
    bias = random(4, 100, 140, seed=6, dtype=dtype, device=device)
    calls = [
        ((q, k, v), {}),
        ((q, k, v), {"is_causal": True}),
        ((q, k, v), {"attn_mask": visible}),
        ((q, k, v), {"attn_mask": bias}),
        ((q, k, v), {"attn_mask": bias[0]}),
        ((q, k, v), {"scale": 0.05}),
        (grouped, {"enable_gqa": True, "is_causal": True}),
        ((q[:, 0], k[:, 0], v[:, 0]), {}),
        ((q[:, 0], k[:, 0], v[:, 0]), {"attn_mask": visible[:, 0]}),
        ((q, k, v, visible, 0.0, False), {}),
    ]
    with sageattention.patched():
        assert F.scaled_dot_product_attention is not torch_sdpa
        found = [F.scaled_dot_product_attention(*arguments, **options) for arguments, options in calls]
    assert F.scaled_dot_product_attention is torch_sdpa
    assert sageattention.counts() == (len(calls), {})
    for out, (arguments, options) in zip(found, calls):
        close(out, torch_sdpa(*arguments, **options), str(options))
        assert out.dtype == dtype


def test_an_older_gpu_is_left_to_torch_where_it_lacks_kernels():
    from sageattention._fallback import _why_not_gpu

    assert _why_not_gpu((7, 5), torch.float16) is None and _why_not_gpu((8, 0), torch.bfloat16) is None
    assert "bfloat16" in _why_not_gpu((7, 5), torch.bfloat16)
    assert "below 7.5" in _why_not_gpu((7, 0), torch.float16)


def test_heads_that_lie_side_by_side_stay_so(device):
    q = random(2, 50, 4, 64, seed=0, dtype=torch.float16, device=device).transpose(1, 2)
    with sageattention.patched():
        out = F.scaled_dot_product_attention(q, q, q)
    assert out.transpose(1, 2).is_contiguous()


def test_what_is_left_to_torch(device, caplog):
    q, k, v = qkv(1, 4, 4, 20, 20, 64, dtype=torch.float16, device=device)
    wide = random(1, 1, 20, 600, seed=0, dtype=torch.float16, device=device)
    learned = q.clone().requires_grad_()
    calls = [
        ("dropout_p is above 0", (q, k, v), {"dropout_p": 0.5}),
        ("heads of so many channels are not computed", (wide, wide, wide), {}),
        ("tensors are torch.float64", (q.double(), k.double(), v.double()), {}),
        ("scale is not a finite number above 0", (q, k, v), {"scale": -0.1}),
        ("scale is not a finite number above 0", (q, k, v), {"scale": 1e-46}),
        ("attn_mask does not broadcast to the scores", (q, k, v), {"attn_mask": torch.ones(20, 19, device=device) > 0}),
        ("a tensor has no element", (q, k[:, :, :0], v[:, :, :0]), {}),
    ]
    if device == "cpu":
        # On a GPU torch itself crashes when it is asked for one of these a second time.
        calls += [
            ("head_dim is not the same for query and key", (q, k[..., :32], v), {}),
            ("batches or heads are broadcast", (q, k.expand(2, 4, 20, 64), v.expand(2, 4, 20, 64)), {}),
        ]
    sageattention.patch()
    with caplog.at_level(logging.WARNING, "sageattention"):
        for reason, arguments, options in calls:
            for _ in range(2):
                try:
                    wanted = torch_sdpa(*arguments, **options)
                except RuntimeError as error:
                    with pytest.raises(RuntimeError, match=str(error).splitlines()[0][:20]):
                        F.scaled_dot_product_attention(*arguments, **options)
                    continue
                found = F.scaled_dot_product_attention(*arguments, **options)
                if not options.get("dropout_p"):
                    assert torch.equal(torch.nan_to_num(found), torch.nan_to_num(wanted)), reason
        with torch.enable_grad():
            F.scaled_dot_product_attention(learned, k, v).sum().backward()
    assert learned.grad is not None
    counts = sageattention.counts()
    # Gradients are the reason that the list does not hold.
    assert counts.accelerated == 0 and len(counts.fallbacks) == len({reason for reason, *_ in calls}) + 1
    for reason, *_ in calls:
        assert any(known.startswith(reason) for known in counts.fallbacks), reason
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) == len(counts.fallbacks), lines


def test_float32_on_a_gpu_is_left_to_torch(cuda):
    q, k, v = qkv(1, 2, 2, 20, 20, 64, device=cuda)
    with sageattention.patched():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), torch_sdpa(q, k, v))
    assert sageattention.counts().fallbacks == {"tensors are torch.float32 on cuda": 1}


def test_autocast_casts_as_torch_does(device):
    q, k, v = qkv(1, 2, 2, 40, 40, 64, device=device)
    with torch.autocast(device, dtype=torch.bfloat16), sageattention.patched():
        out = F.scaled_dot_product_attention(q, k.bfloat16(), v)
        wanted = torch_sdpa(q, k.bfloat16(), v)
    assert out.dtype == wanted.dtype == torch.bfloat16 and sageattention.counts().accelerated == 1
    close(out, wanted)


def test_patches_nest_and_name_schemes(device):
    q, k, v = qkv(1, 2, 2, 200, 200, 64, dtype=torch.float16, device=device)
    # By name: left open, so few keys are not quantised on every GPU.
    with sageattention.patched(int8_scheme(device)):
        quantised = F.scaled_dot_product_attention(q, k, v)
        with sageattention.patched("full"):
            full = F.scaled_dot_product_attention(q, k, v)
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), quantised)
    assert not torch.equal(full, quantised)
    assert torch.equal(full, sageattention.sageattn(q, k, v, scheme="full"))
    with pytest.raises(ValueError, match="scheme: value is sage9, expected one of full, int8"):
        sageattention.patch("sage9")
    assert F.scaled_dot_product_attention is torch_sdpa


def test_multi_head_attention_of_torch(device):
    """nn.MultiheadAttention and nn.TransformerEncoderLayer look the function up at each call."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(64, 4, batch_first=True).to(device=device, dtype=dtype).train()
    x = random(2, 30, 64, seed=0, dtype=dtype, device=device)
    wanted = layer(x, x, x, need_weights=False)[0]
    with sageattention.patched():
        found = layer(x, x, x, need_weights=False)[0]
    assert sageattention.counts().accelerated == 1
    assert relative_l1(found, wanted.double()) < 0.03


def test_wrong_types_are_torch_s_errors():
    q = random(1, 2, 20, 64, seed=0)
    for arguments, options in [
        ((None, q, q), {}),
        ((q, q, [1]), {}),
        ((q, q, q), {"attn_mask": [[True]]}),
        ((q, q, q), {"scale": "half"}),
    ]:
        with pytest.raises(TypeError) as wanted:
            torch_sdpa(*arguments, **options)
        with sageattention.patched(), pytest.raises(TypeError) as found:
            F.scaled_dot_product_attention(*arguments, **options)
        assert str(found.value).splitlines()[0] == str(wanted.value).splitlines()[0]
