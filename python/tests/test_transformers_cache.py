"""Models of Hugging Face transformers over a quantised cache."""

import pytest
import sageattention
import torch
from exact import relative_l1
from test_transformers import MODELS, assert_generates_alike, generated, gpt_oss, llama, prompts

transformers = pytest.importorskip("transformers")

# Logits over keys and values in 8 bits, beside eager attention in full precision: measured worst 0.0099, doubled. On a GPU
# also two roundings of the whole model to bf16, as in test_transformers.
ALLOWED = {"cpu": 0.02, "cuda": 0.06}


@pytest.fixture(scope="module", autouse=True)
def registered():
    sageattention.register_transformers()


def pair(build, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    eager, sage = build("eager", device, dtype), build("sage", device, dtype)
    sage.load_state_dict(eager.state_dict())
    return eager, sage


def cache(values="int8", max_cache_len=128):
    return sageattention.transformers_cache(values=values, max_cache_len=max_cache_len)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("values", ["int8", "fp16"])
@MODELS
def test_generation(device, build, values, padded):
    eager, sage = pair(build, device)
    ids, mask = prompts(60, seed=11, padding=25 if padded else 0, device=device)
    ours = cache(values)
    sageattention.counts(reset=True)
    found = generated(sage, ids, mask, past_key_values=ours)
    assert sageattention.counts().fallbacks == {}
    assert_generates_alike(found, generated(eager, ids, mask), 60, ALLOWED[device])
    assert ours.get_seq_length() == 67
    # Padding is not kept.
    lengths = ours.layers[0]._cache.lengths
    assert lengths == ([42, 67] if padded else [67, 67])


def test_a_prompt_in_chunks_and_another_batch_after_it(device):
    eager, sage = pair(gpt_oss, device)
    ids, _ = prompts(50, seed=3, padding=0, device=device)
    wanted = eager(ids).logits
    ours = cache()
    for _ in range(2):
        found = [sage(chunk, past_key_values=ours).logits for chunk in (ids[:, :30], ids[:, 30:31], ids[:, 31:])]
        assert relative_l1(torch.cat(found, 1), wanted.double()) < ALLOWED[device]
        ours.reset()
        assert ours.get_seq_length() == 0


def test_cropping_forgets_tokens(device):
    eager, sage = pair(llama, device)
    ids, mask = prompts(40, seed=5, padding=10, device=device)
    ours = cache()
    sage(ids, attention_mask=mask, past_key_values=ours)
    ours.crop(-8)
    assert ours.get_seq_length() == 32
    found = sage(ids[:, 32:], attention_mask=mask, past_key_values=ours).logits
    assert relative_l1(found, eager(ids, attention_mask=mask).logits[:, 32:].double()) < ALLOWED[device]
    with pytest.raises(ValueError, match="tokens_to_remove: value is 3, expected 0 or less"):
        ours.crop(3)


def test_beams_share_pages():
    eager, sage = pair(llama, "cpu")
    ids, mask = prompts(30, seed=7, padding=8, device="cpu")
    options = dict(num_beams=3, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
    wanted = eager.generate(ids, attention_mask=mask, **options)
    ours = cache("fp16")
    found = sage.generate(ids, attention_mask=mask, past_key_values=ours, **options)
    assert torch.equal(found[:, :30], ids) and found.shape == wanted.shape
    # What the beams have cached is what a pass over them whole computes.
    layer = ours.layers[0]
    assert len(layer._rows) == len(set(layer._rows)) == 6
    selected = cache("fp16")
    sage(ids, attention_mask=mask, past_key_values=selected)
    selected.reorder_cache(torch.tensor([1, 1]))
    step = torch.full((2, 1), 7)
    both = torch.cat([mask[1:].expand(2, -1), torch.ones(2, 1, dtype=mask.dtype)], 1)
    logits = sage(step, attention_mask=both, past_key_values=selected).logits
    whole = eager(torch.cat([ids[1:].expand(2, -1), step], 1)).logits[:, -1:]
    assert relative_l1(logits, whole.double()) < ALLOWED["cpu"]


def test_rows_of_a_batch_are_taken_apart(device):
    eager, sage = pair(llama, device)
    ids, mask = prompts(30, seed=8, padding=12, device=device)
    ours = cache()
    sage(ids, attention_mask=mask, past_key_values=ours)
    ours.reorder_cache(torch.tensor([1, 0]))
    ours.batch_select_indices(torch.tensor([1]))
    step = torch.full((1, 1), 9, device=device)
    longer = torch.cat([mask[:1], torch.ones_like(step)], 1)
    found = sage(step, attention_mask=longer, past_key_values=ours).logits
    whole = eager(torch.cat([ids[:1], step], 1), attention_mask=longer).logits[:, -1:]
    assert relative_l1(found, whole.double()) < ALLOWED[device]
    with pytest.raises(NotImplementedError, match="repeats: value is 2, expected 1"):
        ours.batch_repeat_interleave(2)


def test_any_mask_is_the_processors():
    eager, sage = pair(llama, "cpu")
    ids, _ = prompts(30, seed=9, padding=0, device="cpu")
    visible = torch.ones(30, 30, dtype=torch.bool).tril()
    visible[20:, 5:9] = False
    mask = visible.expand(2, 1, -1, -1)
    additive = torch.zeros(2, 1, 30, 30).masked_fill(~mask, torch.finfo(torch.float32).min)
    found = sage(ids, attention_mask=mask, past_key_values=cache()).logits
    assert relative_l1(found, eager(ids, attention_mask=additive).logits.double()) < ALLOWED["cpu"]


def test_what_cannot_be_read_is_refused(device):
    eager, sage = pair(llama, device)
    ids, mask = prompts(20, seed=9, padding=0, device=device)
    with pytest.raises(NotImplementedError, match="keys and values of a sageattention cache are quantised"):
        eager(ids, past_key_values=cache())
    with torch.enable_grad(), pytest.raises(NotImplementedError, match="requires_grad is True"):
        sage(ids, past_key_values=cache())
    with pytest.raises(ValueError, match="values: value is int5, expected fp16, bf16, int8 or fp8"):
        sage(ids, past_key_values=cache("int5"))
    sageattention.register_transformers("sage_full", scheme="full")
    named = llama("sage_full", device, next(sage.parameters()).dtype)
    with pytest.raises(NotImplementedError, match="scheme: value is full, expected None"):
        named(ids, past_key_values=cache())
    if device == "cuda":
        with pytest.raises(ValueError, match="max_pages: value is none, expected a number"):
            sage(ids, past_key_values=sageattention.transformers_cache())
