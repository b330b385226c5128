"""Attention over predicted blocks: against plain attention under the map that was returned."""

import math

import numpy
import pytest
import sageattention
import torch
from exact import TOLERANCE, assert_close, assert_lse_close, assert_same, attention, local, random, relative_l1, visible
from sageattention import _torch_sparse
from sageattention._predictor import fields
from sageattention._request import Request
from sageattention.sparse import Predictor, predict_blocks, sparse_attention
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

PREDICTORS = {
    "sparge_attn_topk": Predictor.sparge_attn(topk=0.4, simthreshd1=-0.1),
    "sparge_attn_cdf": Predictor.sparge_attn(cdfthreshd=0.9, simthreshd1=0.2).replace(sink_k=(0, 1)),
    "sla": Predictor.sla(0.3),
    "sparge_attn2": Predictor.sparge_attn2(0.1, 0.4),
    "vsa": Predictor.vsa(3),
    "sol_attn": Predictor.sol_attn(0.5).replace(sink_q=(1, 2)),
    "hopper": Predictor.sparge_attn(topk=0.5, simthreshd1=-1.0).replace(block_q=64, block_k=128),
}


def dtype_of(device):
    return torch.float16 if device == "cuda" else torch.float32


def tensors(device, layout="HND", seed=0):
    return local(1, 4, 2, 500, 400, 64, dtype=dtype_of(device), device=device, layout=layout, seed=seed)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "causal_alignment": "top_left"}])
@pytest.mark.parametrize("name", PREDICTORS)
def test_attention_is_that_of_the_map_which_is_returned(device, name, options):
    predictor = PREDICTORS[name]
    q, k, v = tensors(device)
    out, lse, blocks = sparse_attention(q, k, v, predictor, return_lse=True, return_map=True, **options)
    shape = (1, 4, math.ceil(500 / predictor.block_q), math.ceil(400 / predictor.block_k))
    assert blocks.dtype == torch.bool and blocks.shape == shape
    assert 0 < blocks.float().mean() < 0.9, "a map of all blocks tells nothing"
    assert torch.equal(blocks, predict_blocks(q, k, predictor, **options))
    causal = options.get("causal_alignment", "bottom_right") if options else None
    mask = visible(blocks, predictor.block_q, predictor.block_k, 500, 400)
    wanted, wanted_lse = attention(q, k, v, mask=mask, causal=causal)
    assert_close(out, wanted, TOLERANCE["fp8"])
    assert_lse_close(lse, wanted_lse)
    assert_same(sparse_attention(q, k, v, predictor, **options), out)


def with_tail(q, k, v, blocks, block_q, block_k):
    """Attention of a map's blocks, and of the means of the others with the weight of their keys, in float64."""
    q, k, v = q.double(), *(x.repeat_interleave(q.shape[1] // k.shape[1], dim=1).double() for x in (k, v))
    kept = blocks.repeat_interleave(block_q, dim=2)[:, :, : q.shape[2]]
    means = [torch.stack([block.mean(dim=2) for block in x.split(block_k, dim=2)], dim=2) for x in (k, v)]
    sizes = torch.tensor([block.shape[2] for block in k.split(block_k, dim=2)], device=q.device)
    keys, values = (torch.cat(pair, dim=2) for pair in zip((k, v), means))
    of_keys = kept.repeat_interleave(block_k, dim=3)[..., : k.shape[2]]
    scores = q @ keys.transpose(-1, -2) / math.sqrt(q.shape[3])
    scores[..., k.shape[2] :] += sizes.log()
    scores = scores.masked_fill(~torch.cat((of_keys, ~kept), dim=3), -math.inf)
    return scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_pooled_tail_has_the_means_of_what_is_left_out(device, library, layout):
    if library == "numpy" and device == "cuda":
        pytest.skip("numpy's arrays lie in the host's memory")
    q, k, v = given = tensors(device, layout)
    predictor = Predictor.sla(0.3).replace(block_q=128)
    if library == "numpy":
        given = [x.numpy() for x in given]
    options = {"tensor_layout": layout, "return_lse": True, "return_map": True}
    out, lse, blocks = (torch.as_tensor(x) for x in sparse_attention(*given, predictor, pooled_tail=True, **options))
    plain, _, same = (torch.as_tensor(x) for x in sparse_attention(*given, predictor, **options))
    assert torch.equal(blocks, same)
    if layout == "NHD":
        q, k, v, out, plain = (x.transpose(1, 2) for x in (q, k, v, out, plain))
    wanted, wanted_lse = with_tail(q, k, v, blocks, 128, 64)
    assert_close(out, wanted, TOLERANCE["fp8"])
    assert_lse_close(lse, wanted_lse)
    assert relative_l1(plain, wanted) > 2 * relative_l1(out, wanted), "the tail is worth something"


def plain_topk(q, k, topk, block_q, block_k):
    """The blocks of SLA, and of SpargeAttn with blocks that are all similar, in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).double()
    k = k - k.mean(dim=2, keepdim=True)
    q_means, k_means = (
        torch.stack([block.mean(dim=2) for block in x.split(size, dim=2)], dim=2)
        for x, size in ((q.double(), block_q), (k, block_k))
    )
    scores = q_means @ k_means.transpose(-1, -2)
    chosen = scores.topk(max(1, int(topk * scores.shape[-1])), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)


@pytest.mark.parametrize("seed", range(3))
def test_the_prediction_is_what_the_papers_say(device, seed):
    q, k, _ = tensors(device, seed=seed)
    assert torch.equal(predict_blocks(q, k, Predictor.sla(0.3)), plain_topk(q, k, 0.3, 64, 64))
    sparge = Predictor.sparge_attn(topk=0.4, simthreshd1=-1)
    assert torch.equal(predict_blocks(q, k, sparge), plain_topk(q, k, 0.4, 128, 64))
    # A block whose tokens are not alike is computed with all others.
    q[0, 1, 128:256] = random(128, 64, seed=9, dtype=q.dtype, device=device)
    k[0, 1, 64:128] = 4 * random(64, 64, seed=10, dtype=q.dtype, device=device)
    blocks = predict_blocks(q, k, Predictor.sparge_attn(topk=0.2, simthreshd1=0.1))
    assert blocks[0, 1, 1].all() and blocks[0, 2:, :, 1].all()
    assert not blocks[0, 0, 1].all() and not blocks[0, 2:, :, 0].all()


def test_every_library_predicts_the_same_map():
    q, k, v = tensors("cpu")
    predictor = PREDICTORS["sparge_attn_cdf"]
    wanted = sparse_attention(q, k, v, predictor, return_lse=True, return_map=True, is_causal=True)
    jax = pytest.importorskip("jax")
    # Wherever JAX would put its arrays itself, float32 is predicted on the CPU.
    cpu = jax.devices("cpu")[0]
    for array in (lambda x: x.numpy(), lambda x: jax.device_put(x.numpy(), cpu)):
        arrays = [array(x) for x in (q, k, v)]
        found = sparse_attention(*arrays, predictor, return_lse=True, return_map=True, is_causal=True)
        for mine, torchs in zip(found, wanted):
            assert type(mine) is type(arrays[0]) and numpy.array_equal(numpy.asarray(mine), torchs.numpy())
        blocks = predict_blocks(arrays[0], arrays[1], predictor, is_causal=True)
        assert blocks.dtype == bool and numpy.array_equal(numpy.asarray(blocks), wanted[2].numpy())


def test_a_gpu_predicts_the_map_of_the_cpu(cuda):
    for seed, (name, predictor) in enumerate(PREDICTORS.items()):
        for dtype in (torch.float16, torch.bfloat16):
            q, k, v = (x.to(dtype) for x in tensors("cpu", seed=seed))
            on_gpu = [x.to(cuda) for x in (q, k, v)]
            wanted = predict_blocks(q, k, predictor, is_causal=True)
            assert torch.equal(predict_blocks(*on_gpu[:2], predictor, is_causal=True).cpu(), wanted), name
            _, blocks = sparse_attention(*on_gpu, predictor, is_causal=True, return_map=True)
            assert torch.equal(blocks.cpu(), wanted), name


@pytest.mark.parametrize(
    ("callers", "exact"),
    [
        ({"softmax_scale": 0.3}, {"scale": 0.3}),
        ({"softcap": 2.5}, {"softcap": 2.5}),
        ({"window_size": (150, 60)}, {"window": (150, 60)}),
        ({"causal": True, "window": (200, -1)}, {"causal": "bottom_right", "window": (200, None)}),
        ({"smoothing": False}, {}),
        ({"scheme": "full"}, {}),
    ],
    ids=lambda value: "-".join(value),
)
def test_keywords(device, callers, exact):
    if device == "cuda" and callers.get("scheme") == "full":
        callers = {"scheme": "sage2-int8-fp16-per-warp"}
    q, k, v = tensors(device)
    predictor = Predictor.sla(0.3)
    out, lse, blocks = sparse_attention(q, k, v, predictor, return_lse=True, return_map=True, **callers)
    wanted, wanted_lse = attention(q, k, v, mask=visible(blocks, 64, 64, 500, 400), **exact)
    assert_close(out, wanted, TOLERANCE["fp8"])
    assert_lse_close(lse, wanted_lse)
    if "window" not in exact:
        assert torch.equal(blocks, predict_blocks(q, k, predictor)), "scores beyond the map's own change nothing"


def test_layouts_and_explicit_masks(device):
    predictor = PREDICTORS["sparge_attn_topk"]
    heads_first = tensors(device)
    q, k, v = (x.transpose(1, 2) for x in heads_first)
    out, lse, blocks = sparse_attention(q, k, v, predictor, tensor_layout="NHD", return_lse=True, return_map=True)
    wanted = sparse_attention(*heads_first, predictor, return_lse=True, return_map=True)
    assert_same(out, wanted[0].transpose(1, 2))
    assert_same(lse, wanted[1])
    assert torch.equal(blocks, wanted[2])
    assert torch.equal(predict_blocks(q, k, predictor, "NHD"), blocks)
    hidden = random(1, 1, 500, 400, seed=5, device=device) > 0
    bias = random(400, seed=6, dtype=dtype_of(device), device=device)
    shown = visible(blocks, 128, 64, 500, 400)
    for mask, exact in ((hidden, shown & hidden), (bias, bias.double().masked_fill(~shown, -math.inf))):
        out, same = sparse_attention(*heads_first, predictor, attn_mask=mask, return_map=True)
        assert torch.equal(same, blocks), "a mask changes no map"
        assert_close(out, attention(*heads_first, mask=exact)[0], TOLERANCE["fp8"])


def test_heads_may_have_thresholds_of_their_own(device):
    q, k, _ = tensors(device)
    shares, thresholds = [0.2, 0.4, 0.6, 1.0], [-1.0, 0.0, 0.3, 1.0]
    found = predict_blocks(q, k, Predictor.sparge_attn(topk=shares, simthreshd1=thresholds))
    for head, (share, threshold) in enumerate(zip(shares, thresholds)):
        alone = predict_blocks(q, k, Predictor.sparge_attn(topk=share, simthreshd1=threshold))
        assert torch.equal(found[:, head], alone[:, head])
    assert found[:, 3].all() and not found[:, 0].all()
    for values in (tuple(shares), numpy.array(shares), torch.tensor(shares, device=device, dtype=torch.float64)):
        same = Predictor.sparge_attn(topk=values, simthreshd1=torch.tensor(thresholds))
        assert same.threshold == tuple(shares)
        assert torch.equal(predict_blocks(q, k, same), found)


def test_predictors_are_values():
    predictor = Predictor.sparge_attn(topk=[0.5, 0.25], simthreshd1=numpy.float32(0.5))
    assert predictor == Predictor.sparge_attn(topk=(0.5, 0.25), simthreshd1=0.5)
    assert len({predictor, predictor.replace(), predictor.replace(block_q=64)}) == 2
    with pytest.raises(AttributeError):
        predictor.block_q = 64
    made_by_hand = Predictor("topk", [0.5, 0.25], block_q=128, smooth_k=True, simthreshd1=0.5)
    q, k, _ = local(1, 2, 1, 300, 300, 32)
    assert torch.equal(predict_blocks(q, k, made_by_hand), predict_blocks(q, k, predictor))


def test_padded_blocks(device):
    q, k, _ = local(1, 2, 2, 256, 256, 64, dtype=dtype_of(device), device=device)
    sizes = [64, 10, 0, 40]
    predictor = Predictor.vsa(2).replace(k_padding=torch.tensor(sizes), q_padding=sizes)
    blocks = predict_blocks(q, k, predictor)
    assert not blocks[:, :, 2].any() and not blocks[:, :, :, 2].any() and blocks[:, :, [0, 1, 3]].sum() == 2 * 3 * 2
    q[:, :, 74:128], k[:, :, 74:128] = math.nan, math.inf
    assert torch.equal(predict_blocks(q, k, predictor), blocks), "padding counts for nothing"


X = local(1, 4, 2, 200, 200, 32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "topk, cdfthreshd: given are both, expected exactly one", lambda: Predictor.sparge_attn(topk=0.5, cdfthreshd=0.9, simthreshd1=0)),
        (ValueError, "topk, cdfthreshd: given are neither, expected exactly one", lambda: Predictor.sparge_attn(simthreshd1=0)),
        (ValueError, "topk: value is 1.5, expected 0 to 1", lambda: sparse_attention(*X, Predictor.sla(1.5))),
        (ValueError, r"topk\[2\]: value is NaN, expected 0 to 1", lambda: sparse_attention(*X, Predictor.sla([0.1, 0.1, math.nan, 0.1]))),
        (ValueError, r"topk: shape is \[3\], expected \[4\], one for each query head", lambda: sparse_attention(*X, Predictor.sla([0.1] * 3))),
        (ValueError, r"cdfthreshd: shape is \[1\], expected \[4\], one for each", lambda: predict_blocks(*X[:2], Predictor.sparge_attn(cdfthreshd=[0.9], simthreshd1=0))),
        (ValueError, r"topp: shape is \[2, 2\], expected one number, or one for each", lambda: Predictor.sparge_attn2(0.1, torch.ones(2, 2))),
        (TypeError, "topk: value is half, of type str, expected a number", lambda: Predictor.sla("half")),
        (ValueError, "topk: value is 0, expected 1 to", lambda: Predictor.vsa(0)),
        (ValueError, "tau: value is inf, expected a finite number", lambda: predict_blocks(*X[:2], Predictor.sol_attn(math.inf))),
        (ValueError, "block_k: value is 0, expected 1 to", lambda: Predictor.sla(0.1).replace(block_k=0)),
        (TypeError, "blocks: a predictor has no such option, expected one of select, ", lambda: Predictor.sla(0.1).replace(blocks=0)),
        (ValueError, "select: value is best, expected one of topk, count", lambda: sparse_attention(*X, Predictor("best"))),
        (TypeError, r"sink_k: value is 1, expected \(first, end\)", lambda: Predictor.sla(0.1).replace(sink_k=1)),
        (ValueError, r"k_padding\[1\]: value is 65, expected 0 to 64", lambda: Predictor.vsa(1).replace(k_padding=[1, 65])),
        (ValueError, "k_padding: value is 128 tokens in blocks of 64, expected 200 tokens", lambda: predict_blocks(*X[:2], Predictor.vsa(1).replace(k_padding=[1, 64]))),
        (TypeError, "predictor: type is float, expected sageattention.sparse.Predictor", lambda: sparse_attention(*X, 0.5)),
        (ValueError, r"q: shape is \[4, 200, 32\], expected \[batch, heads, seq, head_dim\]", lambda: sparse_attention(X[0][0], *X[1:], Predictor.sla(0.1), return_map=True)),
        (ValueError, r"k: shape is \[2, 200, 32\], expected \[batch, heads, seq, head_dim\]", lambda: predict_blocks(X[0], X[1][0], Predictor.sla(0.1))),
        (ValueError, r"k: shape is \[2, 200, 32\], expected \[batch, heads", lambda: predict_blocks(X[0].numpy(), X[1][0].numpy(), Predictor.sla(0.1))),
        (TypeError, "k: dtype is f16, expected f32, as q", lambda: predict_blocks(X[0], X[1].half(), Predictor.sla(0.1))),
        (TypeError, "q: type is list, expected a tensor of torch", lambda: predict_blocks([1], X[1], Predictor.sla(0.1))),
        (NotImplementedError, "pooled_tail with an explicit mask is not supported", lambda: sparse_attention(*X, Predictor.sla(0.1), pooled_tail=True, attn_mask=torch.ones(200, 200, dtype=torch.bool))),
        (TypeError, "pooled_tail: value is 3", lambda: sparse_attention(*X, Predictor.sla(0.1), pooled_tail=3)),
        (NotImplementedError, "dropout_p: value is 0.5, expected None or 0", lambda: sparse_attention(*X, Predictor.sla(0.1), dropout_p=0.5)),
        (TypeError, "return_maps: sparse_attention has no such keyword, expected return_map", lambda: sparse_attention(*X, Predictor.sla(0.1), return_maps=True)),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_memory_for_a_map_is_checked():
    from sageattention import _native
    from sageattention._predictor import native_predictor
    from sageattention._request import native_options

    q, k, v = X
    options = native_options(Request())
    predictor = native_predictor(fields(Predictor.sla(0.5), q, "HND"))
    for blocks in (torch.ones(1, 4, 4, 3), torch.ones(1, 4, 4, 4), torch.ones(1, 4, 4, 4, dtype=torch.bool).mT):
        with pytest.raises(
            ValueError, match=r"map: shape is .*, expected \[1, 4, 4, 4\] of bool or uint8 without gaps"
        ):
            _native.predict(q, k, blocks, options, predictor)
    with pytest.raises(NotImplementedError, match="a map without a predictor"):
        _native.forward(q, k, v, torch.empty_like(q), options, map=torch.ones(1, 4, 4, 4, dtype=torch.bool))
    blocks = torch.full((1, 4, 4, 4), 7, dtype=torch.uint8)
    _native.predict(q, k, blocks, options, predictor)
    assert torch.equal(blocks.bool(), predict_blocks(q, k, Predictor.sla(0.5))) and blocks.max() == 1


def test_empty_tensors(device):
    dtype = dtype_of(device)
    for q_len, kv_len in ((0, 70), (70, 0), (0, 0)):
        q = torch.ones(1, 2, q_len, 64, dtype=dtype, device=device)
        k = torch.ones(1, 2, kv_len, 64, dtype=dtype, device=device)
        out, lse, blocks = sparse_attention(q, k, k, Predictor.sla(0.5), return_lse=True, return_map=True)
        assert out.shape == q.shape and not out.any() and torch.isneginf(lse).all()
        assert blocks.shape == (1, 2, math.ceil(q_len / 64), math.ceil(kv_len / 64)) and not blocks.any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_no_graph_break(device, backend):
    def model(q, k, v):
        predictor = Predictor.sparge_attn(topk=0.5, simthreshd1=-0.1).replace(sink_k=(0, 1))
        out, lse, blocks = sparse_attention(2 * q, k, v, predictor, is_causal=True, return_lse=True, return_map=True)
        return out + 1, lse, blocks, predict_blocks(q, k, PREDICTORS["sparge_attn_cdf"])

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in range(2):
        arguments = tensors(device, seed=seed)
        for found, wanted in zip(compiled(*arguments), model(*arguments)):
            assert torch.equal(found, wanted)


def test_lengths_stay_symbols_when_exported(device):
    class Model(torch.nn.Module):
        def forward(self, q):
            out, blocks = sparse_attention(q, q, q, Predictor.sla(0.4), return_map=True)
            return out, blocks

    length = torch.export.Dim("length", min=130, max=4096)
    q = tensors(device)[0]
    exported = torch.export.export(Model(), (q,), dynamic_shapes=({2: length},))
    longer = local(1, 4, 2, 700, 700, 64, dtype=dtype_of(device), device=device)[0]
    for found, wanted in zip(exported.module()(longer), Model()(longer)):
        assert torch.equal(found, wanted)


def test_fake_and_real_outputs_agree(device):
    q, k, v = tensors(device, "NHD")
    options = (*fields(PREDICTORS["sparge_attn_topk"], q, "NHD"), *Request(tensor_layout="NHD"))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator in _torch_sparse._sparse_ops.values():
        for sinks, lens in ((None, None), (torch.ones(4, device=device), torch.tensor([40], device=device))):
            torch.library.opcheck(operator.overload, (q, k, v, None, sinks, lens, *options), test_utils=checks)
    for lens in (None, torch.tensor([40], device=device)):
        torch.library.opcheck(_torch_sparse._predict_op.overload, (q, k, lens, *options), test_utils=checks)
    meta = [x.to("meta") for x in (q, k, v)]
    out, blocks = sparse_attention(*meta, PREDICTORS["sparge_attn_topk"], "NHD", return_map=True)
    assert out.shape == q.shape and blocks.shape == (1, 4, 4, 7)


def test_flops_autocast_and_derivatives(device):
    q, k, v = tensors(device)
    predictor = Predictor.sla(0.3)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        sparse_attention(q, k, v, predictor)
    assert counter.get_total_flops() == 4 * 4 * 500 * 400 * 64
    with torch.autocast(device, dtype=torch.bfloat16):
        assert sparse_attention(q.float(), k.float(), v, predictor).dtype == torch.bfloat16
    leaf = q.clone().requires_grad_()
    with torch.enable_grad():
        with pytest.raises(NotImplementedError, match="q: requires_grad is True, expected False"):
            sparse_attention(leaf, k, v, predictor)
        assert not predict_blocks(leaf, k, predictor).requires_grad
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="q: has a tangent"):
        sparse_attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v, predictor)


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_whoever_looks_sees_the_operators_and_nobody_else_pays_for_them(device, monkeypatch):
    q, k, v = tensors(device)
    predictor = Predictor.sla(0.3)

    def call():
        return *sparse_attention(q, k, v, predictor, return_lse=True, return_map=True), predict_blocks(q, k, predictor)

    wanted = call()
    with Recording() as dispatched:
        for found, same in zip(call(), wanted):
            assert torch.equal(found, same)
    assert {"sageattention::sparse_lse_map", "sageattention::predict"} <= set(dispatched.names)

    def refuse(*_):
        raise AssertionError("the dispatcher was called")

    operators = {key: operator._replace(overload=refuse) for key, operator in _torch_sparse._sparse_ops.items()}
    monkeypatch.setattr(_torch_sparse, "_sparse_ops", operators)
    monkeypatch.setattr(_torch_sparse, "_predict_op", _torch_sparse._predict_op._replace(overload=refuse))
    call()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_computes_each(device):
    q, k, v = (
        x.expand(3, -1, -1, -1) * torch.arange(1, 4, device=device)[:, None, None, None] for x in tensors(device)
    )
    predictor = PREDICTORS["sparge_attn_topk"]

    def each(q, k, v):
        return sparse_attention(q, k, v, predictor, return_lse=True, return_map=True)

    found = torch.func.vmap(each)(q[:, None], k[:, None], v[:, None])
    for mine, wanted in zip(found, each(q, k, v)):
        assert_same(mine[:, 0], wanted)
    blocks = torch.func.vmap(lambda q, k: predict_blocks(q, k, predictor))(q[:, None], k[:, None])
    assert torch.equal(blocks[:, 0], predict_blocks(q, k, predictor))


def test_sparsity_buys_little_error_where_attention_is_local(device):
    """The figures that a user looks at: how many blocks are left out, at what error."""
    q, k, v = local(1, 4, 4, 1000, 1000, 64, dtype=dtype_of(device), device=device)
    dense = attention(q, k, v)[0]
    errors = {}
    for share in (0.15, 0.3, 0.6):
        out, blocks = sparse_attention(q, k, v, Predictor.sla(share), return_map=True)
        assert blocks.float().mean().item() == pytest.approx(int(share * 16) / 16)
        errors[share] = relative_l1(out, dense)
    print({share: round(error, 4) for share, error in errors.items()})
    assert errors[0.15] > 5 * errors[0.3] and errors[0.3] < 0.02 and errors[0.6] < 0.02
    assert sageattention.counts().accelerated > 0
