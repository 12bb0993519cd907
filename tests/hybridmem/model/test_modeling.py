"""Common uses of transformers models: saving, loading, generation and training."""

import inspect
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, LogitsProcessorList

from hybridmem import HybridMemConfig, HybridMemForCausalLM, HybridMemModel
from tests.hybridmem.models import KINDS, VARIANTS, tiny_config, tiny_model, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_give_the_same_model(kind, tmp_path):
    model, ids = tiny_model(torch.float32, **KINDS[kind]), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, HybridMemForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), HybridMemConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), HybridMemModel)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def greedy(model, ids, steps):
    """Decode greedily without a cache, with a forward pass over the whole text for every token."""
    for _ in range(steps):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    return ids


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_generation_equals_reading_again(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(time=13)
    expected = greedy(model, ids, 12)
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)
    chunked = model.generate(ids, attention_mask=mask, prefill_chunk_size=4, **settings)
    assert torch.equal(chunked, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_does_not_change_generated_text(kind):
    model = tiny_model(**KINDS[kind])
    short, long = tokens(batch=1, time=6, seed=3), tokens(batch=1, time=15, seed=4)
    ids = torch.cat((torch.cat((torch.zeros(1, 9, dtype=torch.long), short), dim=1), long))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    settings = dict(max_new_tokens=10, do_sample=False, pad_token_id=0)
    for extra in ({}, dict(prefill_chunk_size=4)):
        together = model.generate(ids, attention_mask=mask, **settings, **extra)
        for row, alone in ((0, short), (1, long)):
            expected = greedy(model, alone, 10)[0, alone.shape[1] :]
            assert torch.equal(together[row, 15:], expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_beams_sampling_and_several_sequences(variant):
    model, ids = tiny_model(torch.float32, variant=variant), tokens(time=9)
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0)
    beams = model.generate(ids, num_beams=3, num_return_sequences=2, **settings, return_dict_in_generate=True)
    no_cache = model.generate(ids, num_beams=3, num_return_sequences=2, use_cache=False, **settings)
    assert torch.equal(beams.sequences, no_cache)
    torch.manual_seed(0)
    sampled = model.generate(ids, do_sample=True, num_return_sequences=4, **settings)
    assert sampled.shape == (8, 15)
    assert len({tuple(row.tolist()) for row in sampled[:4]}) > 1


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_continues_from_a_returned_cache(variant):
    model, ids = tiny_model(variant=variant), tokens(batch=1, time=9)
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    first = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    more = torch.cat((first.sequences, tokens(batch=1, time=4, seed=9)), dim=1)
    mask = torch.ones_like(more)
    second = model.generate(more, attention_mask=mask, past_key_values=first.past_key_values, **settings)
    assert torch.equal(second.sequences, greedy(model, more, 5))


@torch.no_grad()
def test_generation_from_embeddings():
    model, ids = tiny_model(variant="mag"), tokens(time=9)
    settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    from_embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings)
    assert torch.equal(from_embeddings, model.generate(ids, **settings)[:, 9:])


@torch.no_grad()
@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "swa", "full"])
def test_attention_weights_under_eager(variant):
    model, ids = tiny_model(variant=variant), tokens(time=20)
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == 2
    columns = 2 + 20 * (2 if variant == "mac" else 1)
    for weights in attentions:
        assert weights.shape == (2, 4, 20, columns)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        keys = torch.arange(columns) - 2
        future = (keys[None] % 20 if variant == "mac" else keys[None]) > torch.arange(20)[:, None]
        assert (weights[..., future & (keys >= 0)] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_eager_equals_sdpa(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens()
    documents = (torch.arange(40) // 15).expand(2, -1)
    expected = model(ids).logits, model(ids, document_ids=documents).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(model(ids, document_ids=documents).logits, expected[1], rtol=0, atol=1e-10)


def test_labels_give_the_shifted_cross_entropy():
    model, ids = tiny_model(), tokens()
    labels = ids.clone()
    labels[:, :5] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, expected, check_dtype=False)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected, check_dtype=False)


def test_last_logits_alone():
    model, ids = tiny_model(), tokens()
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_equal_gradients(kind):
    grads = []
    for checkpointing in (False, True):
        model, ids = tiny_model(**KINDS[kind]).train(), tokens()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-12)


def test_resizing_the_vocabulary_keeps_the_rest():
    model, ids = tiny_model(), tokens()
    before = model(ids).logits
    model.resize_token_embeddings(45, mean_resizing=False)
    assert model.config.vocab_size == 45
    torch.testing.assert_close(model(ids).logits[..., :37], before)


def test_tied_embeddings_survive_saving(tmp_path):
    model, ids = tiny_model(torch.float32, tie_word_embeddings=True), tokens()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_stays_finite_and_near(kind, dtype):
    torch.manual_seed(0)
    model, ids = HybridMemForCausalLM(tiny_config(**KINDS[kind])).eval(), tokens(time=120)
    with torch.no_grad():
        exact = model(ids).logits
        low = model.to(dtype)(ids).logits
    assert low.dtype == dtype
    assert torch.isfinite(low).all()
    assert (low.float() - exact).abs().mean() < 0.2 * exact.abs().mean()


def test_autocast_keeps_the_memory_in_float32():
    model, ids = tiny_model(torch.float32, variant="mag"), tokens()
    cache = DynamicCache(config=model.config)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, past_key_values=cache, use_cache=True)
    assert cache.layers[0].state.memory.scan.weight.dtype == torch.float32


def test_a_foreign_cache_is_named():
    model, ids = tiny_model(), tokens()
    with pytest.raises(TypeError, match=r"build it with DynamicCache\(config=model.config\)"):
        model(ids, past_key_values=DynamicCache(config=None), use_cache=True)


def test_one_of_ids_and_embeddings():
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model()()


def test_initial_weights_follow_the_configuration():
    torch.manual_seed(0)
    model = HybridMemForCausalLM(tiny_config(attention_conv=True))
    memory = model.model.layers[0].mixer.memory
    queries, keys, _ = memory.qkv_proj.weight.chunk(3)
    assert torch.equal(queries, keys)
    x = torch.randn(1, 5, 16)
    alpha, eta, theta = memory._gates(x)
    assert alpha.max() < 0.05
    assert (eta - 0.5).abs().max() < 1e-6
    assert theta.max() <= 2 * 0.25 / 1.5
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name


def test_stopping_and_processors_see_every_token():
    model, ids = tiny_model(variant="mag"), tokens(batch=1, time=5)
    seen = []

    def processor(input_ids, scores):
        seen.append(input_ids.shape[1])
        return scores

    model.generate(
        ids, max_new_tokens=4, do_sample=False, pad_token_id=0, logits_processor=LogitsProcessorList([processor])
    )
    assert seen == [5, 6, 7, 8]


@pytest.mark.parametrize(
    "changes",
    [
        dict(memory_step="damped"),
        dict(memory_step="raw", memory_depth=2),
        dict(memory_momentum=False),
        dict(attention_conv=True, num_persistent_tokens=0),
    ],
    ids=str,
)
def test_all_modules_are_initialised(changes):
    """This includes modules with only submodules, which transformers skips in custom code."""
    mixer = HybridMemForCausalLM(tiny_config(**changes)).model.layers[0].mixer
    assert (mixer.attention_norm.weight == 0.2).all()
    assert (mixer.allocation_gate.weight == 0).all()
    assert (mixer.memory.gate_proj.bias[:2] < -3).all()
    for name, parameter in mixer.named_parameters():
        assert parameter.abs().max() < 10, name


def test_mac_trains_under_eager_attention():
    model, ids = tiny_model(variant="mac").train(), tokens()
    model.set_attn_implementation("eager")
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_of_padding_alone_is_read(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(time=6)
    padded = torch.nn.functional.pad(ids, (9, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (9, 0))
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    out = model.generate(padded, attention_mask=mask, prefill_chunk_size=4, **settings)
    assert torch.equal(out[:, 9:], greedy(model, ids, 5))


def test_a_deep_memory_starts_with_gradients_as_tame_as_a_linear_one():
    text = Path(inspect.__file__).read_bytes()[: 4 * 1024]
    ids = torch.tensor(list(text)).view(4, 1024)
    shape = dict(hidden_size=128, num_hidden_layers=3, memory_head_dim=32, memory_chunk_size=32, attention_window=64)
    norms = {}
    for depth in (1, 2, 3):
        torch.manual_seed(0)
        model = HybridMemForCausalLM(tiny_config(memory_depth=depth, attention_conv=True, vocab_size=256, **shape))
        model(ids, labels=ids).loss.backward()
        norms[depth] = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert max(norms[2], norms[3]) < 2 * norms[1]


def test_mac_attends_as_far_back_as_the_other_variants():
    assert HybridMemConfig(variant="mac", attention_window=16).segment_length == 16
    assert HybridMemConfig(variant="mac", attention_window=16, segment_length=4).segment_length == 4


def test_whole_numbers_stand_for_real_ones():
    config = tiny_config(rope_theta=10_000, attention_dropout=0, memory_max_grad_norm=1, partial_rotary_factor=1)
    assert config.rope_theta == 10_000
