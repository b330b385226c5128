"""integrations/comfyui: its override called as ComfyUI calls one, and its nodes with a model's options."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exact import TOLERANCE, assert_close, attention, int8_scheme, qkv, random

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"


def _load():
    """As ComfyUI loads a folder of `custom_nodes`: a package by its path, under any name."""
    spec = importlib.util.spec_from_file_location(
        "custom_node_sage", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_node_sage"] = module
    spec.loader.exec_module(module)
    return module


comfyui = _load()
AttentionOverride = sys.modules["custom_node_sage.attention_override"].AttentionOverride
parse_blocks = sys.modules["custom_node_sage.attention_override"].parse_blocks


class Model:
    """What the nodes use of ComfyUI's ModelPatcher: options, and clones that copy them."""

    def __init__(self, options=None):
        self.model_options = options if options is not None else {"transformer_options": {}}

    def clone(self):
        return Model(copy.deepcopy(self.model_options))


def torch_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
):
    """An attention function as ComfyUI has several, whose name says in the output that it was called."""
    torch_attention.calls += 1
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


torch_attention.calls = 0


def call(override, q, k, v, heads, *args, transformer_options=None, **kwargs):
    return override(
        torch_attention,
        q,
        k,
        v,
        heads,
        *args,
        **kwargs,
        transformer_options=transformer_options,
        _inside_attn_wrapper=True,
    )


@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("mask_rank", [0, 2, 3, 4])
def test_layouts_and_masks(device, mask_rank, skip_reshape, skip_output_reshape):
    q, k, v = qkv(2, 4, 4, 90, 77, 64, dtype=torch.float16, device=device)
    mask = None
    if mask_rank:
        shape = {2: (90, 77), 3: (2, 90, 77), 4: (2, 1, 90, 77)}[mask_rank]
        mask = random(*shape, seed=3, dtype=torch.float16, device=device)
    wide = mask[:, None] if mask_rank == 3 else mask
    wanted = attention(q, k, v, mask=wide)[0]
    if not skip_reshape:
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    override = AttentionOverride()
    out = call(override, q, k, v, 4, mask, None, skip_reshape, skip_output_reshape=skip_output_reshape)
    assert_close(out, wanted if skip_output_reshape else wanted.transpose(1, 2).flatten(2), TOLERANCE["fp16"])
    assert sum(override.accelerated.values()) == 1 and not override.left


def test_blocks_keep_comfyuis_attention_where_they_are_not_named(device):
    q, k, v = (x.transpose(1, 2).flatten(2) for x in qkv(1, 2, 2, 40, 40, 64, dtype=torch.float16, device=device))
    override = AttentionOverride(blocks=parse_blocks("0-1, 3"))
    torch_attention.calls = 0
    for block in (0, 1, 2, 3, None):
        call(override, q, k, v, 2, transformer_options={"block_index": block} if block is not None else {})
    assert torch_attention.calls == 2
    report = override.report()
    assert "SageAttention computed 3 of 5 calls" in report and "block 0, block 1, block 3" in report
    assert "2 were left to ComfyUI's own attention: its block is not among those that are accelerated" in report


def test_steps_have_their_schemes(device):
    q, k, v = (x.transpose(1, 2).flatten(2) for x in qkv(1, 2, 2, 100, 300, 64, dtype=torch.float16, device=device))
    inner = int8_scheme(device)
    override = AttentionOverride(inner, outer="full", first=1, last=1)
    sigmas = torch.tensor([14.0, 7.0, 3.0, 1.0, 0.0], device=device)
    for step in range(4):
        of_step = sigmas[step : step + 1].clone()
        for _ in range(2):
            call(override, q, k, v, 2, transformer_options={"sigmas": of_step, "sample_sigmas": sigmas})
    call(override, q, k, v, 2)
    assert override.accelerated == {("no block", "full"): 5, ("no block", inner): 4}


def test_what_cannot_be_computed_stops_no_image(device):
    q, k, v = (x.transpose(1, 2).flatten(2) for x in qkv(1, 2, 2, 40, 40, 64, dtype=torch.float16, device=device))
    override = AttentionOverride()
    torch_attention.calls = 0
    call(override, q, k, v, 2, low_precision_attention=False)
    call(override, q, k, v, 2, attention_sinks=torch.zeros(2))
    call(override, q.double(), k.double(), v.double(), 2)
    assert torch_attention.calls == 3 and not override.accelerated
    assert any("float64" in reason for reason in override.left)
    assert "attention_sinks is not known here" in override.left


def test_an_earlier_override_gets_what_is_left(device):
    q, k, v = (x.transpose(1, 2).flatten(2) for x in qkv(1, 2, 2, 40, 40, 64, dtype=torch.float16, device=device))
    seen = []

    def earlier(func, *args, **kwargs):
        seen.append(func)
        return func(*args, **kwargs)

    override = AttentionOverride(blocks=frozenset({1}), previous=earlier)
    call(override, q, k, v, 2, transformer_options={"block_index": 0})
    call(override, q, k, v, 2, transformer_options={"block_index": 1})
    assert seen == [torch_attention]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "sage9"}, "scheme: value is sage9"),
        ({"blocks": "3-1"}, "blocks: value is 3-1, expected the smaller number first"),
        ({"blocks": "x"}, "blocks: value is x, expected all, a number"),
        ({"first_steps": -1}, "first: value is -1, expected at least 0"),
    ],
)
def test_wrong_inputs_of_the_node(arguments, message):
    node = comfyui.NODE_CLASS_MAPPINGS["SageAttentionModel"]()
    with pytest.raises(ValueError, match=message):
        node.apply(Model(), **{"scheme": "auto", **arguments})


def test_the_nodes(device):
    q, k, v = (x.transpose(1, 2).flatten(2) for x in qkv(1, 2, 2, 40, 40, 64, dtype=torch.float16, device=device))
    loaded = Model()
    nodes = {name: node() for name, node in comfyui.NODE_CLASS_MAPPINGS.items()}
    (model,) = nodes["SageAttentionModel"].apply(loaded, "auto")
    (model,) = nodes["SageAttentionModel"].apply(model, "full")
    assert loaded.model_options == {"transformer_options": {}}, "the loaded model is left as it was"
    # A sampler works on a clone.
    override = model.clone().model_options["transformer_options"]["optimized_attention_override"]
    call(override, q, k, v, 2, transformer_options={"block_index": 0})
    latent = {"samples": q}
    shown = nodes["SageAttentionReport"].report(model, latent)
    assert shown["result"][0] is latent and "computed 1 of 1 calls" in shown["result"][1]
    assert shown["ui"]["text"] == [shown["result"][1]]
    assert "computed 0 of 0" in nodes["SageAttentionReport"].report(model, latent)["result"][1]
    assert "no SageAttention" in nodes["SageAttentionReport"].report(loaded, latent)["result"][1]


def test_the_example_workflow_has_the_nodes_inputs():
    workflow = json.loads((FOLDER / "example_workflow.json").read_text())
    ours = [node for node in workflow.values() if node["class_type"] in comfyui.NODE_CLASS_MAPPINGS]
    assert len(ours) == 2
    for node in ours:
        declared = comfyui.NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()
        names = {**declared["required"], **declared.get("optional", {})}
        assert set(node["inputs"]) == set(names)
        for name, value in node["inputs"].items():
            kind = names[name][0]
            if isinstance(kind, list):
                assert value in kind
            elif isinstance(value, list):
                assert value[0] in workflow
    assert comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys() == comfyui.NODE_CLASS_MAPPINGS.keys()


def test_its_schemes_are_known():
    from sageattention._request import check_scheme

    for scheme in sys.modules["custom_node_sage.nodes"].SCHEMES[1:]:
        check_scheme(scheme)
