"""Attention over predicted blocks of packed sequences: each is attention of its own."""

import numpy
import pytest
import torch
from exact import local
from sageattention import _torch_sparse
from sageattention._predictor import fields
from sageattention._request import Request
from sageattention.sparse import Predictor, sparse_attention, sparse_attention_varlen
from torch.utils.flop_counter import FlopCounterMode

BOUNDS = ([0, 300, 300, 460, 500], [0, 250, 400, 410, 700])

PREDICTORS = {
    "sparge_attn": Predictor.sparge_attn(topk=0.4, simthreshd1=[-0.1, 0.2, 0.3, 0.9]).replace(sink_k=(0, 1)),
    "sla": Predictor.sla(0.3),
    "sol_attn": Predictor.sol_attn(0.5).replace(block_q=128),
}


def packed(device):
    dtype = torch.float16 if device == "cuda" else torch.float32
    return [x[0].transpose(0, 1) for x in local(1, 4, 2, 500, 700, 64, dtype=dtype, device=device, sharp=1.5)]


def each_by_itself(q, k, v, predictor, **options):
    """The output and log-sum-exp of every sequence with queries, one call each."""
    for (q0, q1), (k0, k1) in zip(*(zip(ends, ends[1:]) for ends in BOUNDS)):
        if q1 > q0:
            one = (x[None, a:b].transpose(1, 2) for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
            out, lse = sparse_attention(*one, predictor, return_lse=True, **options)
            yield slice(q0, q1), out[0].transpose(0, 1), lse[0]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (100, 50)}])
@pytest.mark.parametrize("name", PREDICTORS)
def test_sequences_are_predicted_each_by_itself(device, name, options):
    q, k, v = packed(device)
    sinks = torch.tensor([0.5, -1.0, 3.0, float("-inf")], device=device)
    options = {"sinks": sinks, "scheme": "full", **options}
    if device == "cuda" and "window" in options:
        with pytest.raises(NotImplementedError, match="a block mask with a window that hides the first keys"):
            sparse_attention_varlen(q, k, v, PREDICTORS[name], *BOUNDS, 300, 290, **options)
        return
    out, lse = sparse_attention_varlen(q, k, v, PREDICTORS[name], *BOUNDS, 300, 290, return_lse=True, **options)
    assert out.shape == q.shape and lse.shape == (4, 500)
    for rows, wanted, wanted_lse in each_by_itself(q, k, v, PREDICTORS[name], **options):
        assert (out[rows].float() - wanted.float()).abs().max() < 5e-3
        assert torch.allclose(lse[:, rows], wanted_lse, atol=2e-3)
    # The longest are found where nobody says them, and boundaries are tensors as well as lists.
    lists = (torch.tensor(bounds, device=device) for bounds in BOUNDS)
    again = sparse_attention_varlen(q, k, v, PREDICTORS[name], *lists, None, None, **options)
    assert torch.equal(again, out)


def test_arrays_graphs_and_flops():
    q, k, v = packed("cpu")
    predictor = PREDICTORS["sla"]
    wanted = sparse_attention_varlen(q, k, v, predictor, *BOUNDS, 300, 290)
    arrays = sparse_attention_varlen(*(x.numpy() for x in (q, k, v)), predictor, *map(numpy.array, BOUNDS), 300, 290)
    assert torch.equal(torch.from_numpy(arrays), wanted)
    lists = [torch.tensor(bounds) for bounds in BOUNDS]
    function = torch.compile(
        lambda q, k, v, a, b: sparse_attention_varlen(q, k, v, predictor, a, b, 300, 290) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(function(q, k, v, *lists), wanted * 2)
    with FlopCounterMode(display=False) as flops:
        sparse_attention_varlen(q, k, v, predictor, *lists, 300, 290)
    pairs = sum((q1 - q0) * (k1 - k0) for (q0, q1), (k0, k1) in zip(*(zip(ends, ends[1:]) for ends in BOUNDS)))
    assert flops.get_total_flops() == 2 * 4 * pairs * 128


def test_fake_and_real_outputs_agree(device):
    q, k, v = packed(device)
    options = (*fields(PREDICTORS["sparge_attn"], q, "HND", packed=True), *Request())
    lists = [torch.tensor(bounds, device=device) for bounds in BOUNDS]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator in _torch_sparse._varlen_ops.values():
        for sinks in (None, torch.ones(4, device=device)):
            arguments = (q, k, v, sinks, *lists, 300, 290, *options)
            torch.library.opcheck(operator.overload, arguments, test_utils=checks)


def test_what_is_wrong_is_named():
    q, k, v = packed("cpu")
    with pytest.raises(ValueError, match=r"simthreshd1: shape is \[2\], expected \[4\], one for each query head"):
        sparse_attention_varlen(q, k, v, PREDICTORS["sla"].replace(simthreshd1=[0.1, 0.2]), *BOUNDS, None, None)
    with pytest.raises(ValueError, match=r"cu_seqlens_k\[4\]: value is 600, expected 700"):
        sparse_attention_varlen(q, k, v, PREDICTORS["sla"], BOUNDS[0], [0, 250, 400, 410, 600], None, None)
    with pytest.raises(ValueError, match=r"q: shape is \[1, 500, 4, 64\], expected \[total, heads, head_dim\]"):
        sparse_attention_varlen(q[None], k, v, PREDICTORS["sla"], *BOUNDS, None, None)
