"""Hugging Face transformers: attn_implementation="sage"."""

import logging

import pytest
import sageattention
import torch
from exact import TOLERANCE, attention, int8_scheme, qkv, relative_l1

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def registered():
    sageattention.register_transformers()


def llama(implementation, device, dtype):
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def pair(device, build=llama):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sdpa, sage = build("sdpa", device, dtype), build("sage", device, dtype)
    sage.load_state_dict(sdpa.state_dict())
    return sdpa, sage


def test_llama_with_grouped_heads(device):
    sdpa, sage = pair(device)
    ids = torch.randint(0, 500, (2, 300), generator=torch.Generator().manual_seed(1)).to(device)
    error = relative_l1(sage(ids).logits, sdpa(ids).logits.double())
    print(f"logits: relative L1 against SDPA {error:.5f}")
    # Three layers of INT8 attention; on a GPU also two roundings of the whole model to bf16.
    assert 0 < error < (0.02 if device == "cpu" else 0.04)


def test_left_padding(device):
    sdpa, sage = pair(device)
    ids = torch.randint(0, 500, (2, 200), generator=torch.Generator().manual_seed(2)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :60] = 0
    wanted, found = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (sdpa, sage))
    assert relative_l1(found, wanted.double()) < (0.02 if device == "cpu" else 0.04)


def test_generation_with_a_cache(device):
    sdpa, sage = pair(device)
    ids = torch.randint(0, 500, (1, 150), generator=torch.Generator().manual_seed(3)).to(device)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    options.update(output_logits=True, return_dict_in_generate=True)
    wanted, found = (model.generate(ids, **options) for model in (sdpa, sage))
    assert found.sequences.shape == wanted.sequences.shape
    # A near-tie may be decided otherwise; up to there the logits must agree.
    for step, (x, y) in enumerate(zip(found.logits, wanted.logits)):
        if not torch.equal(found.sequences[:, : 150 + step], wanted.sequences[:, : 150 + step]):
            break
        assert relative_l1(x, y.double()) < (0.02 if device == "cpu" else 0.04), step


def gemma(implementation, device, dtype):
    config = transformers.Gemma2Config(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=40, attn_logit_softcapping=5.0,
        attn_implementation="eager" if implementation == "sdpa" else implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config).to(device=device, dtype=dtype).eval()


def test_sliding_windows_and_capped_logits(device):
    """Gemma 2, which SDPA cannot compute: against transformers' plain one."""
    eager, sage = pair(device, gemma)
    ids = torch.randint(0, 500, (2, 150), generator=torch.Generator().manual_seed(4)).to(device)
    assert relative_l1(sage(ids).logits, eager(ids).logits.double()) < (0.02 if device == "cpu" else 0.04)


def test_bert_sees_both_ways(device):
    def bert(implementation, device, dtype):
        config = transformers.BertConfig(
            vocab_size=500, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
            attn_implementation=implementation,
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.BertModel(config).to(device=device, dtype=dtype).eval()

    sdpa, sage = pair(device, bert)
    ids = torch.randint(0, 500, (2, 180), generator=torch.Generator().manual_seed(5)).to(device)
    mask = torch.ones_like(ids)
    mask[1, 100:] = 0
    wanted, found = (model(ids, attention_mask=mask).last_hidden_state[mask.bool()] for model in (sdpa, sage))
    assert relative_l1(found, wanted.double()) < (0.02 if device == "cpu" else 0.04)


def gpt_oss(implementation, device, dtype):
    config = transformers.GptOssConfig(
        vocab_size=500, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=20, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"], attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(config).to(device=device, dtype=dtype).eval()


def deepseek(implementation, device, dtype):
    config = transformers.DeepseekV3Config(
        vocab_size=500, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
        q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=2,
        attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.DeepseekV3ForCausalLM(config).to(device=device, dtype=dtype).eval()


def wide(implementation, device, dtype):
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=640, attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def gemma4(implementation, device, dtype):
    """Layers with a window have heads of 256 channels, the others of 512, whose keys are their values."""
    config = transformers.Gemma4TextConfig(
        vocab_size=500, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_global_key_value_heads=1, head_dim=256, global_head_dim=512, sliding_window=20,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0, vocab_size_per_layer_input=500,
        num_kv_shared_layers=0, attn_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma4ForCausalLM(config).to(device=device, dtype=dtype).eval()


def prompts(length, *, seed, padding, device):
    """Tokens of two sequences and their mask; the first sequence begins with so much padding."""
    ids = torch.randint(0, 500, (2, length), generator=torch.Generator().manual_seed(seed)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("build", [deepseek, gemma4])
def test_heads_of_many_channels_and_values_of_few(device, build, padded):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sageattention.register_transformers("sage_full", scheme="full")
    eager, sage, full = (build(name, device, dtype) for name in ("eager", "sage", "sage_full"))
    exact = build("eager", device, torch.float32)
    for model in (sage, full, exact):
        model.load_state_dict(eager.state_dict())
    ids, mask = prompts(150, seed=9, padding=40 if padded else 0, device=device)
    sageattention.counts(reset=True)
    logits = [model(ids, attention_mask=mask).logits[mask.bool()] for model in (exact, eager, sage, full)]
    counts = sageattention.counts()
    theirs, found, precise = (relative_l1(x, logits[0].double()) for x in logits[1:])
    print(f"logits: relative L1 {found:.5f}, in full precision {precise:.6f}, eager {theirs:.6f}, {counts}")
    # Each is a layer's call; on a GPU those of widths that no kernel of it has go to torch.
    left = sum(number for reason, number in counts.fallbacks.items() if reason.startswith(CHANNELS))
    assert counts.accelerated + left == 4 and (device == "cuda" or left == 0)
    # Gemma 4's scores are products of normalised queries and keys by no factor, of untrained weights N(0, 22): INT8 is off
    # by a quarter of a score, and the logits by 0.077 and 0.084, doubled.
    allowed = 0.17 if build is gemma4 else 0.02
    # Elements of 16 bits cost eager attention something as well, and ours as much, doubled.
    assert found < allowed + 2 * theirs
    assert precise < 1e-5 + 2 * theirs


CHANNELS = "heads of so many channels are not computed on "


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("build", "other", "reason"),
    [(wide, "sdpa", CHANNELS)],
    ids=["wide"],
)
def test_what_is_not_computed_here_is_left_to_transformers(device, build, other, reason, padded, caplog):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    reason = reason + device if reason == CHANNELS else reason
    theirs, sage = build(other, device, dtype), build("sage", device, dtype)
    sage.load_state_dict(theirs.state_dict())
    ids, mask = prompts(50, seed=6, padding=20 if padded else 0, device=device)
    sageattention.counts(reset=True)
    with caplog.at_level(logging.WARNING, "sageattention"):
        wanted, found = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (theirs, sage))
    assert relative_l1(found, wanted.double()) < (1e-5 if device == "cpu" else 0.02)
    assert sageattention.counts() == (0, {reason: 2})
    lines = [record.getMessage() for record in caplog.records if record.name == "sageattention"]
    assert lines == [f"transformers' attention is left to torch: {reason}"]
    with sageattention.patched():
        sage(ids, attention_mask=mask)
    assert sageattention.counts().fallbacks == {reason: 4}, "each call counts once under patch() too"


def generated(model, ids, mask, **options):
    """Logits of eight tokens that a model adds to prompts, and the tokens."""
    options.update(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    options.update(output_logits=True, return_dict_in_generate=True)
    return model.generate(ids, attention_mask=mask, **options)


def assert_generates_alike(found, wanted, prompt, allowed):
    """A near-tie may be decided otherwise; up to there the logits must agree."""
    assert found.sequences.shape == wanted.sequences.shape
    steps = 0
    for step, (x, y) in enumerate(zip(found.logits, wanted.logits)):
        if not torch.equal(found.sequences[:, : prompt + step], wanted.sequences[:, : prompt + step]):
            break
        assert relative_l1(x, y.double()) < allowed, step
        steps += 1
    assert steps > 0


MODELS = pytest.mark.parametrize("build", [llama, gemma, gpt_oss])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@MODELS
def test_generation_by_every_cache_of_transformers(device, build, cache, padded):
    """Static caches, padding, and windows that are shorter than prompts, against eager attention."""
    eager, sage = (
        build(name, device, torch.bfloat16 if device == "cuda" else torch.float32) for name in ("eager", "sage")
    )
    sage.load_state_dict(eager.state_dict())
    ids, mask = prompts(60, seed=11, padding=25 if padded else 0, device=device)
    options = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    sageattention.counts(reset=True)
    found = generated(sage, ids, mask, **options)
    assert sageattention.counts().fallbacks == {} and sageattention.counts().accelerated > 0
    assert_generates_alike(found, generated(eager, ids, mask, **options), 60, 0.03 if device == "cpu" else 0.06)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_sinks(device, padded):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    eager, sage = (gpt_oss(name, device, dtype) for name in ("eager", "sage"))
    sage.load_state_dict(eager.state_dict())
    for model in (eager, sage):
        # From one that hardly matters to one that takes most of the weight.
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([-3.0, 0.0, 3.0, 6.0]))
    ids, mask = prompts(50, seed=6, padding=20 if padded else 0, device=device)
    sageattention.counts(reset=True)
    wanted, found = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (eager, sage))
    assert relative_l1(found, wanted.double()) < (0.02 if device == "cpu" else 0.04)
    assert sageattention.counts() == (2, {})


def test_training_is_left_to_transformers():
    sdpa, sage = pair("cpu")
    ids = torch.randint(0, 500, (1, 40), generator=torch.Generator().manual_seed(7))
    sageattention.counts(reset=True)
    with torch.enable_grad():
        for model in (sdpa, sage):
            model.train()
            model(ids, labels=ids).loss.backward()
    for x, y in zip(sdpa.parameters(), sage.parameters()):
        assert torch.equal(x.grad, y.grad)
    assert sageattention.counts() == (0, {"a tensor requires its gradient, and there is no backward pass yet": 3})


def forward(q, k, v, mask=None, **options):
    from sageattention._transformers import attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups = q.shape[1] // k.shape[1]
    return attention_forward(module, q, k, v, mask, **options)[0].transpose(1, 2)


def test_dropout_and_negative_scales(device):
    q, k, v = qkv(1, 4, 2, 50, 50, 64, dtype=torch.bfloat16, device=device)
    sageattention.counts(reset=True)
    found = forward(q, k, v, scaling=-0.1)
    assert relative_l1(found, attention(q, k, v, scale=-0.1, causal="top_left")[0]) < TOLERANCE["fp16"]
    dropped = forward(q, k, v, dropout=0.9)
    assert relative_l1(dropped, attention(q, k, v, causal="top_left")[0]) > 0.3
    assert sageattention.counts() == (1, {"dropout_p is above 0": 1})
    with pytest.raises(NotImplementedError, match="has no eager_attention_forward"):
        forward(q, k, v, dropout=0.1, softcap=5.0)


def test_a_name_may_have_a_scheme(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sageattention.register_transformers("sage_full", scheme="full")
    sageattention.register_transformers("sage_int8", scheme=int8_scheme(device))
    sdpa, full, int8 = (llama(name, device, dtype) for name in ("sdpa", "sage_full", "sage_int8"))
    ids = torch.randint(0, 500, (1, 100), generator=torch.Generator().manual_seed(8)).to(device)
    wanted, precise, quantised = (model(ids).logits for model in (sdpa, full, int8))
    assert not torch.equal(precise, quantised)
    assert relative_l1(precise, wanted.double()) < (1e-5 if device == "cpu" else 0.02)
    with pytest.raises(ValueError, match="scheme: value is sage9, expected one of full, int8"):
        sageattention.register_transformers("sage", scheme="sage9")
