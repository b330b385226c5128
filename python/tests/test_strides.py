"""Tensors as PyTorch has them: whatever their strides, the result is that of contiguous ones."""

import pytest
import sageattention
import torch
import torch.nn.functional as F
from exact import TOLERANCE, assert_close, attention, qkv, random

torch_sdpa = F.scaled_dot_product_attention


def channels_apart(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def rows_apart(x):
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


def every_second_channel(x):
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def heads_inside(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def batch_innermost(x):
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def off_by_one(x):
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


VIEWS = [channels_apart, rows_apart, every_second_channel, heads_inside, batch_innermost, off_by_one]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("entry", ["patch", "HND", "NHD", "lse", "varlen"])
def test_views(device, entry, view):
    shape = (2, 4, 4, 60, 90, 64)
    q, k, v = qkv(*shape, dtype=torch.float16, device=device)
    mask = random(2, 4, 60, 90, seed=5, dtype=torch.float16, device=device)
    if entry == "varlen":
        packed = [x[0].transpose(0, 1) for x in (q, k, v)]
        seen = [view(x[None])[0] for x in packed]
        out = sageattention.sageattn_varlen(*seen, [0, 60], [0, 90], 60, 90).transpose(0, 1)[None]
        assert_close(out, attention(q[:1], k[:1], v[:1])[0], TOLERANCE["fp16"])
        return
    wanted = attention(q, k, v, mask=mask)[0]
    if entry == "NHD":
        arguments = [view(x.transpose(1, 2)) for x in (q, k, v)]
        out = sageattention.sageattn(*arguments, tensor_layout="NHD", attn_mask=view(mask)).transpose(1, 2)
    elif entry == "patch":
        sageattention.counts(reset=True)
        with sageattention.patched():
            out = F.scaled_dot_product_attention(view(q), view(k), view(v), attn_mask=view(mask))
        assert sageattention.counts() == (1, {})
    else:
        out = sageattention.sageattn(view(q), view(k), view(v), attn_mask=view(mask), return_lse=entry == "lse")
        out = out[0] if entry == "lse" else out
    assert_close(out, wanted, TOLERANCE["fp16"])


@pytest.mark.parametrize("which", ["q", "k", "v", "all"])
@pytest.mark.parametrize("dimension", range(4))
def test_expanded_tensors(device, which, dimension):
    """Strides of 0, which repeat one batch entry, head, row or channel."""
    tensors = qkv(2, 4, 4, 60, 60, 64, dtype=torch.float16, device=device)
    if which == "all":
        tensors = [x.narrow(dimension, 0, 1).expand_as(x) for x in tensors]
    else:
        tensors = [x.narrow(dimension, 0, 1).expand_as(x) if name == which else x for name, x in zip("qkv", tensors)]
    wanted = attention(*tensors)[0]
    with sageattention.patched():
        for out in (F.scaled_dot_product_attention(*tensors), sageattention.sageattn(*tensors)):
            assert_close(out, wanted, TOLERANCE["fp16"])


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize(
    "shape", [(2, 4, 60, 90), (2, 1, 1, 90), (1, 4, 60, 1), (60, 1), (1, 90), (4, 1, 90), (1, 1, 1, 1)]
)
def test_masks_of_any_strides(device, kind, shape):
    q, k, v = qkv(2, 4, 4, 60, 90, 64, dtype=torch.float16, device=device)
    mask = random(*shape, seed=5, dtype=torch.float16, device=device)
    if kind == "bool":
        mask = mask > -1
    wanted = attention(q, k, v, mask=mask)[0]
    full = mask.expand(*(2, 4, 60, 90)[-mask.ndim :])
    for seen in (mask, full, channels_apart(mask), every_second_channel(full)):
        with sageattention.patched():
            for out in (
                F.scaled_dot_product_attention(q, k, v, attn_mask=seen),
                sageattention.sageattn(q, k, v, attn_mask=seen),
            ):
                assert_close(out, wanted, TOLERANCE["fp16"])


def test_the_operator_s_contract_holds_for_views(device):
    from sageattention import _sdpa

    q, k, v = (channels_apart(x) for x in qkv(1, 2, 2, 20, 20, 64, dtype=torch.float16, device=device))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_sdpa._sdpa_op.overload, (q, k, v, None, True, None, None), test_utils=checks)

    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    with sageattention.patched():
        assert torch.equal(torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, v), call(q, k, v))


def test_conjugate_and_negative_views_are_resolved(device):
    q, k, v = qkv(1, 2, 2, 20, 20, 64, dtype=torch.float16, device=device)
    negative = torch._neg_view(q)
    assert negative.is_neg()
    assert torch.equal(sageattention.sageattn(negative, k, v), sageattention.sageattn(-q, k, v))
