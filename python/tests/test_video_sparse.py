"""FastVideo's functions against themselves in plain torch."""

import math

import pytest
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, attention, local, random, visible
from sageattention.sparse import block_sparse_attn_from_indices, video_sparse_attn
from test_sinks import with_sinks

SIZES = [64, 64, 30, 64, 1, 64]


def tensors(device, blocks, kv_blocks, block=64, heads=3):
    dtype = torch.float16 if device == "cuda" else torch.float32
    return local(2, heads, heads, blocks * block, kv_blocks * block, 64, dtype=dtype, device=device)


def real(sizes, block, device):
    return (torch.arange(block) < torch.tensor(sizes)[:, None]).flatten().to(device)


def plain(q, k, v, sizes, q_sizes, topk, block, gate):
    """In float64: means, the coarse branch, the blocks that score highest, and attention of them."""

    def means(x, sizes):
        x = x.double() * real(sizes, block, x.device)[:, None]
        return x.unflatten(2, (-1, block)).sum(dim=3) / torch.tensor(sizes, device=x.device)[:, None]

    scores = means(q, q_sizes) @ means(k, sizes).mT / math.sqrt(q.shape[-1])
    coarse = (scores.softmax(dim=-1) @ means(v, sizes)).repeat_interleave(block, dim=2)
    blocks = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(topk, dim=-1).indices, True)
    mask = visible(blocks, block, block, q.shape[2], k.shape[2]) & real(sizes, block, q.device)
    return attention(q, k, v, mask=mask)[0] + coarse * gate.double(), blocks


@pytest.mark.parametrize("block_size", [64, (4, 4, 4), 128, (8, 8, 4)])
def test_video_sparse_attention(device, block_size):
    block = block_size if isinstance(block_size, int) else math.prod(block_size)
    q_sizes = [block] * 4
    sizes = [size * block // 64 for size in SIZES]
    q, k, v = tensors(device, 4, 6, block)
    gate = random(2, 3, 4 * block, 64, seed=7, dtype=q.dtype, device=device)
    wanted, _ = plain(q, k, v, sizes, q_sizes, 2, block, gate)
    lists = [torch.tensor(sizes, device=device), torch.tensor(q_sizes, device=device)]
    # Padding may hold anything.
    padding = ~real(sizes, block, device)
    k[:, :, padding], v[:, :, padding] = 100.0, math.nan
    out = video_sparse_attn(q, k, v, *lists, 2, block_size, compress_attn_weight=gate)
    assert out.dtype == q.dtype
    assert_close(out, wanted, TOLERANCE["fp8"])
    ungated = video_sparse_attn(q, k, v, *lists, topk=2, block_size=block_size)
    closed = video_sparse_attn(q, k, v, *lists, 2, block_size, compress_attn_weight=torch.zeros_like(gate))
    coarse, _ = plain(
        q,
        k.masked_fill(padding[:, None], 0),
        v.masked_fill(padding[:, None], 0),
        sizes,
        q_sizes,
        2,
        block,
        torch.ones_like(gate),
    )
    assert_close(ungated, coarse, TOLERANCE["fp8"])
    assert not torch.equal(ungated, closed)


def test_more_blocks_than_there_are_and_empty_ones(device):
    q, k, v = tensors(device, 2, 3)
    sizes = torch.tensor([64, 0, 10], device=device)
    full = torch.tensor([64, 0], device=device)
    out = video_sparse_attn(q, k, v, sizes, full, 9, compress_attn_weight=torch.zeros((), device=device))
    shown = real(sizes.tolist(), 64, device).expand(2, 3, 128, 192)
    assert_close(out[:, :, :64], attention(q, k, v, mask=shown)[0][:, :, :64], TOLERANCE["fp8"])
    assert torch.isfinite(out).all()


def test_listed_blocks(device):
    q, k, v = tensors(device, 4, 6, heads=4)
    k, v = k[:, :2], v[:, :2]
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(6, generator=generator) for _ in range(2 * 4 * 4)]).reshape(2, 4, 4, 6)
    number = torch.randint(0, 7, (2, 4, 4), generator=generator)
    listed = torch.arange(6) < number[..., None]
    blocks = torch.zeros(2, 4, 4, 6, dtype=torch.bool).scatter(-1, order, listed).to(device)
    # What stands behind the listed ones is no block.
    indices = torch.where(listed, order, -7).to(device=device, dtype=torch.int32)
    arguments = (q, k, v, indices, number.to(device=device, dtype=torch.int32), torch.tensor(SIZES, device=device))
    out, lse = block_sparse_attn_from_indices(*arguments)
    mask = visible(blocks, 64, 64, 256, 384) & real(SIZES, 64, device)
    wanted, wanted_lse = attention(q, k, v, mask=mask)
    assert_close(out, wanted, TOLERANCE["fp8"])
    assert_lse_close(lse * math.log(2), wanted_lse)
    sinks = torch.tensor([1.0, -2.0, float("-inf"), 4.0], device=device)
    out, lse = block_sparse_attn_from_indices(*arguments, sinks=sinks)
    wanted, wanted_lse = with_sinks(wanted, wanted_lse, sinks)
    assert_close(out, wanted, TOLERANCE["fp8"])
    assert_lse_close(lse * math.log(2), wanted_lse)


def test_no_graph_break(device):
    q, k, v = tensors(device, 4, 6)
    sizes, full = torch.tensor(SIZES, device=device), torch.full((4,), 64, device=device)

    def model(q, k, v):
        return video_sparse_attn(q, k, v, sizes, full, 2) + 1

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), model(q, k, v))


def test_errors():
    q, k, v = tensors("cpu", 2, 3)
    sizes, full = torch.tensor([64, 64, 64]), torch.tensor([64, 64])
    for message, arguments in {
        "block_size: value is 63, expected 64, 128 or 256 tokens": (q, k, v, sizes, full, 1, 63),
        r"q: shape is \[2, 3, 127, 64\], expected \[batch, heads, blocks \* 64, head_dim\]": (q[:, :, 1:], k, v, sizes, full, 1),
        r"k, v: shapes are \[2, 2, 192, 64\] and \[2, 3, 192, 64\], expected \[2, 3, k_len, 64\], as q": (q, k[:, 1:], v, sizes, full, 1),
        r"variable_block_sizes: shape is \[2\], expected \[3\], one for each block": (q, k, v, full, full, 1),
        r"q_variable_block_sizes: shape is \[3\], expected \[2\]": (q, k, v, sizes, sizes, 1),
        "topk: value is 0, expected at least 1 block": (q, k, v, sizes, full, 0),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            video_sparse_attn(*arguments)
    with pytest.raises(TypeError, match="variable_block_sizes: dtype is float32, expected int32 or int64"):
        video_sparse_attn(q, k, v, sizes.float(), full, 1)
    with pytest.raises(TypeError, match="q: type is ndarray, expected torch.Tensor"):
        video_sparse_attn(q.numpy(), k, v, sizes, full, 1)
    with pytest.raises(ValueError, match=r"q2k_num: shape is \[2, 3, 1\], expected \[2, 3, 2\]"):
        number = torch.ones(2, 3, 1, dtype=torch.int32)
        block_sparse_attn_from_indices(q, k, v, torch.zeros(2, 3, 2, 2, dtype=torch.int32), number, sizes)
