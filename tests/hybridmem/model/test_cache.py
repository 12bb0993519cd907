"""Caches of every kind in transformers, which either hold the streaming state or raise an error with a remedy."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, QuantizedCache, StaticCache
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from hybridmem.model.cache import StreamingLayer
from tests.hybridmem.models import KINDS, VARIANTS, tiny_config, tiny_model, tokens

REFUSED = ("quantized", "paged")
SERVED = [name for name in ALL_CACHE_IMPLEMENTATIONS if name not in REFUSED]
HOW = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)


@torch.no_grad()
@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_streaming_state_serves_in_place_of_a_static_cache(variant, name):
    model, ids = tiny_model(variant=variant), tokens(time=13)
    expected = model.generate(ids, **HOW)
    assert torch.equal(model.generate(ids, **HOW, cache_implementation=name), expected)
    assert torch.equal(model.generate(ids, **HOW, cache_implementation=name, prefill_chunk_size=5), expected)
    out = model.generate(ids, **HOW, cache_implementation=name, num_beams=2, return_dict_in_generate=True)
    assert all(isinstance(layer, StreamingLayer) for layer in out.past_key_values.layers)
    assert torch.equal(out.sequences, model.generate(ids, **HOW, num_beams=2))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_static_cache_streams(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(time=20)
    cache = StaticCache(config=model.config, max_cache_len=20)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids).logits, rtol=0, atol=1e-10)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(model.generate(ids, **HOW, past_key_values=cache), model.generate(ids, **HOW))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_caches_raise_with_a_remedy(name):
    remedy = f"cache_implementation='{name}'.*leave (cache_implementation|it) unset"
    with pytest.raises(ValueError, match=remedy) as error:
        tiny_model().generate(tokens(time=13), **HOW, cache_implementation=name)
    assert "\n" not in str(error.value)


def test_continuous_batching_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"generate_batch.*call generate on a left-padded batch"):
        tiny_model().generate_batch([[1, 2, 3]])


LLAMA = LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=4)
FOREIGN = {
    "StaticCache with StaticLayer": lambda: StaticCache(config=LLAMA, max_cache_len=16),
    "DynamicCache with DynamicLayer": lambda: DynamicCache(config=LLAMA),
    "DynamicCache with no layers": DynamicCache,
    "DynamicCache with SwaStreamingLayer": lambda: DynamicCache(config=tiny_config(variant="swa")),
    "DynamicCache with MagStreamingLayer": lambda: DynamicCache(config=tiny_config(num_hidden_layers=1)),
    "QuantizedCache with Fp8QuantizedLayer": lambda: QuantizedCache(backend="fp8", config=LLAMA),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_cache_that_cannot_hold_the_states_is_named(name):
    model = tiny_model()
    with pytest.raises(TypeError, match=rf"a {name},.*\['mag', 'mag'\]; build it with DynamicCache\(config=model"):
        model(tokens(), past_key_values=FOREIGN[name](), use_cache=True)


@torch.no_grad()
def test_an_exported_model_takes_static_caches(tmp_path):
    model, ids = tiny_model(torch.float32), tokens(time=9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, **HOW, cache_implementation="static"), model.generate(ids, **HOW))
