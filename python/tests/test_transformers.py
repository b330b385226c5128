"""Hugging Face transformers: attn_implementation="sage"."""

import pytest
import sageattention
import torch
from exact import relative_l1

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


def test_training_is_refused():
    sage = llama("sage", "cpu", torch.float32)
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="requires_grad is True"):
        sage(torch.zeros(1, 10, dtype=torch.long))
