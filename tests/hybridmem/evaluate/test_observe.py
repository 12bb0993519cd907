"""Reads of attention and memory agree with the models' own outputs."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridmem.evaluate import observe
from hybridmem.evaluate.observe import read
from hybridmem.rl.attention.distributions import allocation, memory
from hybridmem.rl.attention.recorder import AttentionRecorder
from tests.hybridmem.models import KINDS, tiny_model, tokens

TIME = 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(observe, "BLOCK", 12)


def full_map(reads):
    """Return all weights (heads, queries, keys); `top` was the number of tokens."""
    heads, queries, top = reads.weights.shape
    return torch.zeros(heads, queries, top).scatter_add(2, reads.places, reads.weights)


def reading_of(model, layers=(0, -1)):
    ids = tokens(batch=1, time=TIME)[0]
    return ids, read(model, ids, 30, layers, TIME)


def test_weights_give_the_output_of_each_head_of_llama():
    torch.manual_seed(0)
    shape = dict(vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2)).eval()
    ids, reading = reading_of(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids[None], output_attentions=True)
    for layer, weights in zip(reading.layers, out.attentions, strict=True):
        assert layer.reads["attention"].heads == ["mean", "head 0", "head 1", "head 2", "head 3"]
        found = full_map(layer.reads["attention"])
        torch.testing.assert_close(found[1:], weights[0])
        torch.testing.assert_close(found[0], weights[0].mean(0))
        torch.testing.assert_close(layer.reads["attention"].total, torch.ones(5, TIME))
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[1:], reduction="none")
    torch.testing.assert_close(reading.nats, expected)


def test_gates_and_memory_of_mag():
    model = tiny_model(torch.float32, variant="mag")
    ids, reading = reading_of(model)
    with torch.no_grad(), AttentionRecorder(model, (0, 1)) as recorder:
        model(ids[None])
    for layer in reading.layers:
        record = recorder.records[layer.number]
        remembered = full_map(layer.reads["memory"])
        torch.testing.assert_close(remembered[0], memory(record, TIME)[0].float(), atol=1e-5, rtol=1e-4)
        series = {each.name: each.values for each in layer.series}
        torch.testing.assert_close(series["share of attention"][0], allocation(record, TIME)[0, :, 2].float())
        torch.testing.assert_close(series["forgetting (alpha)"][1:], record.memory.alpha[0].float())
        seen = full_map(layer.reads["attention"])
        distance = torch.arange(TIME)[:, None] - torch.arange(TIME)
        assert not seen[:, (distance < 0) | (distance >= 7)].any()
        torch.testing.assert_close(seen.sum(-1) + series["attention to persistent tokens"], torch.ones(5, TIME))


def test_segments_of_mac():
    model = tiny_model(torch.float32, variant="mac")
    ids, reading = reading_of(model)
    with torch.no_grad(), AttentionRecorder(model, (0,)) as recorder:
        model(ids[None])
    shares = torch.stack([series.values[0] for series in reading.layers[0].series[:3]], dim=-1)
    torch.testing.assert_close(shares, allocation(recorder.records[0], TIME)[0].float(), atol=1e-5, rtol=1e-4)
    seen = full_map(reading.layers[0].reads["attention"])
    segment = torch.arange(TIME) // 6
    assert not seen[:, segment[:, None] != segment].any()


@pytest.mark.parametrize("kind", ["mah", "mah depth 2", "mah like a base model"])
def test_weights_give_the_outputs_of_heads_with_a_source(kind):
    model = tiny_model(torch.float32, **KINDS[kind])
    outputs, values = {}, {}

    def note(mixer, arguments, _):
        x, state, sequence = arguments
        outputs[mixer.layer_idx] = mixer.mix(x, state, sequence)[0][0]
        values[mixer.layer_idx] = mixer.project(x, sequence).v[0].repeat_interleave(2, 0)

    hooks = [layer.mixer.register_forward_hook(note) for layer in model.model.layers]
    _, reading = reading_of(model)
    for hook in hooks:
        hook.remove()
    for layer in reading.layers:
        mixed = full_map(layer.reads["attention"])[1:] @ values[layer.number]
        by_head = outputs[layer.number].transpose(0, 1)
        sources = layer.sources
        assert sources == [source for source in model.config.head_sources[layer.number] for _ in range(2)]
        for head, source in enumerate(sources):
            until = 7 + model.config.num_sink_tokens if source == "memory" else TIME  # then a token leaves its window
            torch.testing.assert_close(mixed[head, :until], by_head[head, :until], atol=1e-5, rtol=1e-4)
        if "memory" not in sources:
            assert set(layer.reads) == {"attention"}
            continue
        share = next(series for series in layer.series if series.name == "share of the window")
        assert share.heads == ["mean", *(f"head {n}" for n in range(4) if sources[n] == "memory")]
        start = 7 + model.config.num_sink_tokens
        assert (share.values[:, :start] == 1).all()
        assert ((share.values[:, start:] > 0) & (share.values[:, start:] < 1)).all()
        writes = next(series for series in layer.series if series.name == "write (theta)")
        assert writes.start == model.config.num_sink_tokens  # sinks and the last window are never written
        assert writes.values.shape[1] == TIME - start
        if model.config.memory_depth > 1:
            assert "memory" not in layer.reads
            continue
        remembered = full_map(layer.reads["memory"])
        clock = torch.arange(TIME)
        far = (clock[:, None] - clock >= 7) & (clock >= model.config.num_sink_tokens)
        assert not remembered[:, ~far].any()
        torch.testing.assert_close(remembered[1:, start:].sum(-1), torch.ones(len(share.heads) - 1, TIME - start))


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"layers=\[2\] must be indices into the model's 2 layers"):
        reading_of(tiny_model(torch.float32, variant="swa"), layers=(2,))
