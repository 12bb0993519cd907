import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridmem import HybridMemForCausalLM
from hybridmem.data import byte_tokenizer
from hybridmem.evaluate.reader import Reader
from tests.hybridmem.models import tiny_config

EOS = 258


def model(kind: str):
    torch.manual_seed(0)
    if kind == "llama":
        shape = dict(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        return LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.3)).eval()
    return HybridMemForCausalLM(tiny_config(vocab_size=259, variant=kind, initializer_range=0.3)).eval()


@pytest.mark.parametrize("kind", ["llama", "mag", "swa"])
@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_chunks_give_what_one_pass_gives(kind, chunk_size):
    network = model(kind)
    reader = Reader(network, byte_tokenizer(), chunk_size, [EOS])
    ids = torch.arange(40) * 7 % 256
    labels = ids.roll(-1)
    labels[5:20] = -100
    with torch.no_grad():
        logits = network(ids[None]).logits[0]
        written = network.generate(ids[None], max_new_tokens=6, do_sample=False, eos_token_id=EOS)[0, 40:].tolist()
    kept = labels != -100
    nats, hits, usage = reader.predict(ids, labels)
    expected = torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none")
    torch.testing.assert_close(nats, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(hits, logits[kept].argmax(-1) == labels[kept])
    answer = reader.answer(ids.tolist(), 6)
    assert answer.text == byte_tokenizer().decode(written, skip_special_tokens=True)
    assert usage.tokens == answer.usage.tokens == 40
    assert usage.seconds > 0


def test_a_state_is_constant_and_keys_and_values_grow():
    streaming = Reader(model("mag"), byte_tokenizer(), 16, [EOS])
    short, long = (streaming.answer([65] * length, 1).usage for length in (64, 256))
    assert short.state_bytes == long.state_bytes > 0
    assert long.growth == 0
    full = Reader(model("llama"), byte_tokenizer(), 16, [EOS]).answer([65] * 64, 1).usage
    assert full.growth == 2 * 2 * 16 * 4  # layers, keys and values, hidden size, bytes
    assert full.state_bytes == 64 * full.growth


def test_an_answer_ends_with_an_end_token():
    reader = Reader(model("llama"), byte_tokenizer(), 16, list(range(259)))
    assert reader.answer([65, 66], 5).text == ""
