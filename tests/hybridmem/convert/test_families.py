"""Logits of converted models equal transformers' for every family, rotary embedding and way of calling."""

import pytest
import torch
from transformers import DynamicCache

from hybridmem.convert import convert
from tests.hybridmem.convert.bases import FAMILIES, ROPES, base_model, in_float64, texts

WINDOW = 8


def pair(family="llama", rope="default", dtype=torch.float64, **changes):
    base = base_model(family, rope, dtype, **changes)
    return base, convert(base, attention_window=WINDOW, num_sink_tokens=2)


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_in_float64(family, rope):
    base, model = pair(family, rope)
    with in_float64(base):
        expected = base(texts()).logits
    torch.testing.assert_close(model(texts()).logits, expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_agrees_in_float64(family):
    base, model = pair(family, "yarn")
    ids, cache, logits = texts(), DynamicCache(config=model.config), []
    for piece in ids.split([15, 1, 1, 8, 15], dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
    with in_float64(base):
        expected = base(ids).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_agree_in_float32(family, rope):
    base, model = pair(family, rope, torch.float32)
    ids = texts(1, 250)
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [name for name in FAMILIES if "sliding" not in name])
def test_logits_are_the_same_bit_for_bit(family, dtype):
    """Equal calls of attention give equal rounding."""
    base, model = pair(family, "llama3", dtype)
    assert model.dtype == dtype
    assert model(texts()).logits.equal(base(texts()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_generation_agrees(family):
    """Rows of different lengths, with greedy decoding and with beam search."""
    base, model = pair(family)
    ids = texts(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7], ids[0, :7] = 0, 0
    common = dict(attention_mask=mask, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    for search in (dict(do_sample=False), dict(num_beams=3, num_return_sequences=2)):
        with in_float64(base):
            expected = base.generate(ids, **common, **search)
        assert model.generate(ids, **common, **search).equal(expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral sliding", "qwen2 sliding"])
def test_packed_documents_agree(family):
    base, model = pair(family)
    positions = torch.cat((torch.arange(23), torch.arange(17)))[None].expand(2, -1)
    with in_float64(base):
        expected = base(texts(), position_ids=positions, use_cache=False).logits
    found = model(texts(), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_losses_and_gradients_agree():
    base, model = pair("qwen3", "llama3", tie_word_embeddings=True)
    with in_float64(base):
        base(texts(), labels=texts()).loss.backward()
    model(texts(), labels=texts()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in base.named_parameters():
        renamed = name.replace("self_attn", "mixer").replace("mlp", "feed_forward")
        renamed = renamed.replace("input_layernorm", "mixer_norm")
        renamed = renamed.replace("post_attention_layernorm", "feed_forward_norm")
        torch.testing.assert_close(gradients[renamed], parameter.grad, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation):
    base, model = pair("qwen2 sliding", dtype=torch.float32)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(texts()).logits, base(texts()).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_rotary_angles_stay_exact_beyond_the_context():
    """A distant window gives the same logits as a window near the start; float32 angles would be inexact."""
    base = base_model(dtype=torch.float32)
    model = convert(base, attention_window=WINDOW, num_sink_tokens=0, head_source="none")
    near = model(texts(), position_ids=torch.arange(40)[None]).logits
    far = model(texts(), position_ids=2_000_000 + torch.arange(40)[None]).logits
    torch.testing.assert_close(far, near, rtol=0, atol=1e-3)
