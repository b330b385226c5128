"""SpargeAttn's tuner: thresholds that keep their bound, and files of them."""

import pytest
import sageattention
import torch
from exact import assert_same, attention, local, random, relative_l1
from sageattention.sparse import Predictor, predict_blocks
from spas_sage_attn import spas_sage2_attn_meansim_cuda
from spas_sage_attn._head_tuner import HeadTuner, Point, Rule, chosen
from spas_sage_attn.autotune import (
    SparseAttentionMeansim,
    extract_sparse_attention_state_dict,
    load_sparse_attention_state_dict,
)

NAMES = ["is_sparse", "cdfthreshd", "simthreshd1", "simthreshd2", "pvthreshd"]


def tensors(device, layout="HND", seed=0):
    dtype = torch.float16 if device == "cuda" else torch.float32
    return local(1, 2, 1, 640, 640, 64, dtype=dtype, device=device, layout=layout, seed=seed, sharp=1.1)


@pytest.fixture
def tuned(device):
    """Of two calls, and its answer to the second."""
    module = SparseAttentionMeansim(l1=0.06, pv_l1=0.08, tune_pv=True)
    for seed in range(2):
        out = module(*tensors(device, seed=seed), tune_mode=True)
    return module, out


def test_tuned_thresholds_keep_their_bound(device, tuned):
    module, out = tuned
    q, k, v = tensors(device, seed=1)
    assert relative_l1(out, attention(q, k, v)[0]) < 2e-3, "while tuning, attention is torch's"
    assert module.num_data_passed == 2 and module.is_sparse.all() and module.tuning_sparsity.min() > 0.1
    for seed in range(2):
        q, k, v = tensors(device, seed=seed)
        out, left_out = module(q, k, v, return_sparsity=True)
        errors = [relative_l1(out[:, head], attention(q, k, v)[0][:, head]) for head in range(2)]
        print(f"sparsity {left_out:.3f}, errors {errors}")
        # The tuner compares with torch's function, which rounds.
        assert max(errors) < 0.061 and left_out > 0.1
    again = spas_sage2_attn_meansim_cuda(
        q, k, v, cdfthreshd=module.cdfthreshd, simthreshd1=module.simthreshd1, attention_sink=True
    )
    assert_same(again, out)


@pytest.mark.parametrize("causal", [False, True])
def test_layouts_masks_and_other_rules(device, causal):
    layout = "NHD"
    q, k, v = tensors(device, layout)
    mask = random(640, 640, seed=3, device=device) > -1
    wanted = attention(q, k, v, layout=layout, mask=mask, causal="top_left" if causal else None, scale=0.1)[0]
    arguments = {"mask": mask, "is_causal": causal, "scale": 0.1, "tensor_layout": layout}
    for options in ({"sim_rule": "cosine", "cos_sim": 0.995}, {"sim_rule": "rmse", "rmse": 0.02}):
        module = SparseAttentionMeansim(**options)
        out, _ = module(q, k, v, tune_mode=True, return_sparsity=True, **arguments)
        assert out.shape == q.shape and relative_l1(out, wanted) < 2e-3
        found = module(q, k, v, **arguments)
        for head in range(2):
            mine, true = found[:, :, head].double().flatten(), wanted[:, :, head].flatten()
            if "cos_sim" in options:
                assert torch.nn.functional.cosine_similarity(mine, true, dim=0) > 0.995
            else:
                assert (mine - true).square().mean().sqrt() < 0.02


def test_a_head_without_structure_becomes_dense(device):
    q, k, v = tensors(device)
    q, k = (
        random(*q.shape, seed=0, dtype=q.dtype, device=device),
        random(*k.shape, seed=1, dtype=q.dtype, device=device),
    )
    module = SparseAttentionMeansim()
    module(q, k, v, tune_mode=True)
    assert not module.is_sparse.any()
    assert (module.cdfthreshd == 1).all() and (module.simthreshd1 == 1).all()
    out, left_out = module(q, k, v, return_sparsity=True)
    assert left_out == 0 and relative_l1(out, attention(q, k, v)[0]) < 0.075


def test_the_environment_tunes_too(monkeypatch):
    arguments = tensors("cpu")
    module = SparseAttentionMeansim()
    with pytest.raises(RuntimeError, match="cdfthreshd, simthreshd1: values are None, expected thresholds: tune them"):
        module(*arguments)
    monkeypatch.setenv("TUNE_MODE", "1")
    monkeypatch.setenv("PARALLEL_TUNE", "1")
    with sageattention.patched():
        module(*arguments)
    monkeypatch.setenv("TUNE_MODE", "")
    assert module.num_data_passed == 1
    module(*arguments)


def test_what_decides_between_neighbours():
    points = [
        Point(-1.0, 0.9, 0.2, 0),
        Point(-15 / 16, 0.8, 0.3, 0),
        Point(-14 / 16, 0.95, 0.3, 0),
        Point(-13 / 16, 0.7, 0.25, 0),
        Point(-13 / 16, 0.97, 0.4, 1),
    ]
    assert chosen(points[:2]) == (-15 / 16, 0.9, 0.25, 0)
    found = chosen(points)
    assert found[:2] == (-13 / 16, 0.97) and found.sparsity == pytest.approx((0.3 + 0.25 + 0.4) / 3)


def test_similarities_that_no_threshold_parts_have_one_result(device):
    q, k, v = tensors(device)
    tuner = HeadTuner(q, k, v, None, 0, False, None, True, Rule("l1", 0.06, 1.0, 1.0))
    points = tuner.points(0)
    assert [point.simthreshd1 for point in points] == [step / 16 for step in range(-16, -16 + len(points))]
    for point in points[:: max(1, len(points) // 3)]:
        within, left_out = tuner._judged(point.simthreshd1, point.cdfthreshd)
        assert within and left_out == point.sparsity
        if point.cdfthreshd > 0.01:
            assert tuner._least(point.simthreshd1) == point.cdfthreshd


class Model(torch.nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = torch.nn.ModuleList(SparseAttentionMeansim() for _ in range(layers))
        self.layer = torch.nn.Linear(2, 2)


def test_state_makes_a_round_trip(tmp_path):
    arguments = tensors("cpu")
    model = Model()
    assert extract_sparse_attention_state_dict(model) == {}
    for layer in model.layers:
        layer(*arguments, tune_mode=True)
    saved = extract_sparse_attention_state_dict(model, verbose=True)
    assert set(saved) == {f"layers.{layer}.{name}" for layer in range(2) for name in NAMES}
    torch.save(saved, tmp_path / "tuned.pt")
    read = torch.load(tmp_path / "tuned.pt", weights_only=True)
    wanted = model.layers[0](*arguments)
    for load in (
        lambda fresh: load_sparse_attention_state_dict(fresh, read, verbose=True),
        lambda fresh: load_sparse_attention_state_dict(fresh, read, multigpu=True),
        lambda fresh: (fresh.load_state_dict(model.state_dict()), fresh)[1],
    ):
        fresh = load(Model())
        assert torch.equal(fresh.layers[0](*arguments), wanted)
        assert fresh.layers[0].is_sparse.dtype == torch.bool
        assert all(isinstance(getattr(fresh.layers[0], name), torch.nn.Parameter) for name in NAMES)
        # For several GPUs they are loaded onto one.
        assert torch.equal(fresh.layers[0].cdfthreshd.cpu(), model.layers[0].cdfthreshd)
    alone = load_sparse_attention_state_dict(SparseAttentionMeansim(), model.layers[0].state_dict())
    assert torch.equal(alone(*arguments), wanted)


def test_a_file_of_the_original(tmp_path):
    """As it writes them: parameters by module and name; loaded in a model of half precision, flags and all were cast."""
    state = {
        "layers.0.is_sparse": torch.tensor([True, False]),
        "layers.0.cdfthreshd": torch.tensor([0.75, 1.0]),
        "layers.0.simthreshd1": torch.tensor([-0.25, 1.0]),
        "layers.0.simthreshd2": torch.zeros(2),
        "layers.0.pvthreshd": torch.tensor([12.5, 20.0]),
    }
    q, k, v = tensors("cpu")
    wanted = spas_sage2_attn_meansim_cuda(
        q, k, v, cdfthreshd=[0.75, 1.0], simthreshd1=[-0.25, 1.0], attention_sink=True
    )
    for dtype in (None, torch.bfloat16):
        saved = {name: torch.nn.Parameter(x if dtype is None else x.to(dtype), False) for name, x in state.items()}
        torch.save(saved, tmp_path / "original.pt")
        loaded = load_sparse_attention_state_dict(Model(1), torch.load(tmp_path / "original.pt"))
        assert torch.equal(loaded.layers[0](q, k, v), wanted)


def test_attributes_set_by_hand(device):
    q, k, v = tensors(device)
    module = SparseAttentionMeansim()
    module.cdfthreshd = torch.tensor([0.5, 0.9], device=device)
    module.simthreshd1 = torch.nn.Parameter(torch.tensor([-1.0, 0.1], device=device), requires_grad=False)
    call = spas_sage2_attn_meansim_cuda
    wanted = call(q, k, v, cdfthreshd=[0.5, 0.9], simthreshd1=[-1.0, 0.1], attention_sink=True)
    assert_same(module(q, k, v), wanted)
    module.cdfthreshd[0] = 0.99
    changed = call(q, k, v, cdfthreshd=[0.99, 0.9], simthreshd1=[-1.0, 0.1], attention_sink=True)
    assert_same(module(q, k, v), changed)
    assert not torch.equal(changed, wanted)
    module.cdfthreshd.data[0] = 0.5
    assert_same(module(q, k, v), wanted)
    module.cdfthreshd.data[0] = 0.99
    module.is_sparse = [False, True]
    dense_head = call(q, k, v, cdfthreshd=[1.0, 0.9], simthreshd1=[1.0, 0.1], attention_sink=True)
    assert_same(module(q, k, v), dense_head)
    module.is_sparse = None
    module.cdfthreshd, module.simthreshd1 = 0.9, -0.5
    assert_same(module(q, k, v), call(q, k, v, cdfthreshd=0.9, simthreshd1=-0.5, attention_sink=True))
    module.cdfthreshd = [0.1, 0.2]
    module.simthreshd1 = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"simthreshd1: shape is \[3\], expected \[2\], as cdfthreshd"):
        module(q, k, v)


def test_bounds_and_shapes_are_checked():
    for options, message in (
        ({"l1": 0.1}, "pv_l1: value is 0.08, expected more than l1, which is 0.1"),
        ({"l1": -0.1}, "l1: value is -0.1, expected at least 0"),
        ({"cos_sim": 1.1}, "cos_sim: value is 1.1, expected at most 1"),
        ({"rmse": -1}, "rmse: value is -1, expected at least 0"),
        ({"sim_rule": "mse"}, "sim_rule: value is mse, expected l1, cosine or rmse"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseAttentionMeansim(**options)
    module = SparseAttentionMeansim()
    q, k, v = tensors("cpu")
    with pytest.raises(ValueError, match=r"q: shape is \[2, 640, 64\], expected \[batch, heads"):
        module(q[0], k, v)
    with torch.enable_grad():
        for tune_mode in (False, True):
            with pytest.raises(NotImplementedError, match="q: requires_grad is True, expected False"):
                module(q.clone().requires_grad_(), k, v, tune_mode=tune_mode)
    module.init_hyperparams(3, "cpu")
    with pytest.raises(ValueError, match="q: number of heads is 2, expected 3, as were tuned before"):
        module(q, k, v, tune_mode=True)


def test_a_tuned_module_compiles(device):
    module = SparseAttentionMeansim()
    module.cdfthreshd, module.simthreshd1 = [0.8, 0.9], [-1.0, 0.1]
    q, k, v = tensors(device)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, is_causal=True), module(q, k, v, is_causal=True))
    module.cdfthreshd = [0.1, 0.2]
    assert torch.equal(compiled(q, k, v, is_causal=True), module(q, k, v, is_causal=True)), (
        "changed since it was compiled"
    )


def test_the_prediction_has_the_sink(device):
    q, k, _ = tensors(device)
    plain = Predictor.sparge_attn(topk=0.1, simthreshd1=-1)
    sink = predict_blocks(q, k, plain.replace(sink_k=(0, 1)))
    assert sink[..., 0].all() and torch.equal(sink[..., 1:], predict_blocks(q, k, plain)[..., 1:])
