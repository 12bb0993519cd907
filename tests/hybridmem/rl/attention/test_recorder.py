"""Records reproduce eager attention maps, and recording leaves the model unchanged."""

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config

from hybridmem.rl import AttentionRecorder
from hybridmem.rl.attention.distributions import attention, distribution
from hybridmem.rl.attention.targets import TARGETS
from tests.hybridmem.data.vision_models import vision_model
from tests.hybridmem.models import tiny_model, tokens

SHAPE = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=8,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def neox():
    shape = {name: value for name, value in SHAPE.items() if name not in ("head_dim", "num_key_value_heads")}
    return GPTNeoXConfig(**shape, rotary_pct=0.5)


OTHERS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, sliding_window=5, layer_types=["full_attention", "sliding_attention"]),
    "gpt_neox": neox,
}


def other_model(name):
    torch.manual_seed(0)
    config = OTHERS[name]()
    config.initializer_range = 0.3
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def expected(weights, queries):
    """Compute RAL's policy from attention maps: mean over heads, without the query's own token, renormalised."""
    rows = weights.double().mean(1).tril(-1)
    return (rows / rows.sum(-1, keepdim=True).clamp(min=1e-12))[:, -queries:]


def eager_maps(model, ids, **arguments):
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True, use_cache=False, **arguments).attentions
    model.set_attn_implementation("sdpa")
    return maps


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_families(name, padded):
    model, ids = other_model(name), torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(1))
    arguments = {}
    if padded:
        arguments["attention_mask"] = torch.ones_like(ids)
        arguments["attention_mask"][1, :4] = 0
    before = model(ids, use_cache=False, **arguments).logits
    with AttentionRecorder(model, [0, 1]) as recorder:
        during = model(ids, use_cache=False, **arguments).logits
    assert torch.equal(before, during)
    assert model.config._attn_implementation == "sdpa"
    for number, weights in enumerate(eager_maps(model, ids, **arguments)):
        found = attention(recorder.records[number], 12)
        torch.testing.assert_close(found.double(), expected(weights, 12), rtol=0, atol=1e-5)
    assert torch.equal(model(ids, use_cache=False, **arguments).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("windows", [None, [5, None]])
def test_heads_that_read_everything(windows, cached):
    model, ids = tiny_model(variant="mah", sliding_windows=windows), tokens()
    plain = model(ids).logits
    cache = DynamicCache(config=model.config) if cached else None
    if cached:
        model(ids[:, :25], past_key_values=cache)
    with AttentionRecorder(model, [0, 1]) as recorder:
        during = model(ids[:, 25:] if cached else ids, past_key_values=cache, use_cache=cached).logits
    torch.testing.assert_close(during[:, -12:], plain[:, -12:], rtol=0, atol=1e-10)
    seen = [attention(recorder.records[n], 12) for n in range(2)]
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True, use_cache=False).attentions
    for found, weights in zip(seen, maps if windows is None else [], strict=windows is None):
        torch.testing.assert_close(found[:, :, -40:].double(), expected(weights, 12), rtol=0, atol=1e-5)
    if windows is not None:
        assert (seen[0] > 0).sum(-1).max() <= 4  # a window minus the query's own token


@torch.no_grad()
def test_heads_of_other_sources_are_refused():
    model = tiny_model(variant="mah", head_sources=[["full", "none"], ["full", "full"]])
    with AttentionRecorder(model, [1]):
        model(tokens())
    with AttentionRecorder(model, [0]), pytest.raises(ValueError, match="heads with a source other than full"):
        model(tokens())


@torch.no_grad()
def test_a_vision_language_model():
    model = vision_model().eval()
    model.set_attn_implementation("sdpa")
    ids = torch.randint(0, 50, (2, 9))
    with AttentionRecorder(model) as recorder:
        model(input_ids=ids, use_cache=False)
    (record,) = recorder.records.values()
    weights = eager_maps(model, ids)[-1]
    torch.testing.assert_close(attention(record, 9).double(), expected(weights, 9), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["swa", "full", "mag", "mal"])
def test_our_own_models(variant):
    model, ids = tiny_model(variant=variant), tokens(time=20)
    persistent = model.config.num_persistent_tokens
    with AttentionRecorder(model, [0, 1]) as recorder:
        model(ids, use_cache=False)
    for number, weights in enumerate(eager_maps(model, ids)):
        found = attention(recorder.records[number], 11)
        torch.testing.assert_close(found, expected(weights[..., persistent:], 11), rtol=0, atol=1e-10)


@torch.no_grad()
def test_mac_attends_within_its_segment():
    model, ids = tiny_model(variant="mac"), tokens(time=20)
    persistent = model.config.num_persistent_tokens
    with AttentionRecorder(model) as recorder:
        model(ids, use_cache=False)
    weights = eager_maps(model, ids)[-1][..., persistent + 20 :]  # columns: persistent, recalled, tokens
    torch.testing.assert_close(attention(recorder.records[1], 13), expected(weights, 13), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("earlier", [1, 5, 6, 7, 12, 15, 19])
def test_mac_records_equal_with_a_cache_of_the_first_tokens(earlier, target):
    model, ids = tiny_model(variant="mac"), tokens(time=20)
    queries = 20 - earlier
    with AttentionRecorder(model) as recorder:
        model(ids, use_cache=False)
        whole = distribution(recorder.records[1], target, queries)
        cache = DynamicCache(config=model.config)
        model(ids[:, :earlier], past_key_values=cache, use_cache=True)
        model(ids[:, earlier:], past_key_values=cache, use_cache=True)
        found = distribution(recorder.records[1], target, queries)
    unread = whole.shape[-1] - found.shape[-1]  # segments before the one that an earlier pass left open
    assert unread == (earlier // 6 * 6 if target == "attention" else 0)
    torch.testing.assert_close(found, whole[..., unread:], rtol=0, atol=1e-10)
    assert not whole[..., :unread].any()


def test_records_carry_gradients_and_a_later_pass_replaces_them():
    model, ids = tiny_model(variant="mag"), tokens(time=9)
    with AttentionRecorder(model) as recorder:
        model(ids, use_cache=False)
        first = recorder.records[1]
        model(ids[:, :5], use_cache=False)
    assert recorder.records[1].attention.q.shape[2] == 5
    attention(first, 4).square().sum().backward()
    projection = model.model.layers[1].mixer.attention.qkv_proj.weight
    assert projection.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["ours", "llama"])
def test_a_pass_with_a_cache_holds_every_key(name):
    model = tiny_model(variant="full", dtype=torch.float32) if name == "ours" else other_model(name)
    ids = tokens(time=14)
    with AttentionRecorder(model) as recorder:
        model(ids, use_cache=False)
        whole = attention(recorder.records[1], 4)
        cache = model(ids[:, :10], use_cache=True).past_key_values
        model(ids[:, 10:], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(attention(recorder.records[1], 4), whole, rtol=0, atol=1e-5)


def test_unsupported_models_and_inputs_raise():
    model = tiny_model(variant="mag")
    with pytest.raises(ValueError, match="must be different indices into the model's 2 layers"):
        AttentionRecorder(model, [2])
    with pytest.raises(ValueError, match="no module has is_causal and layer_idx"):
        AttentionRecorder(torch.nn.Linear(1, 1))
    mac, ids = tiny_model(variant="mac"), tokens(time=9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="use prompts of equal length"), AttentionRecorder(mac):
        mac(ids, attention_mask=mask)
    documents = torch.arange(9).expand(2, -1) // 4
    with pytest.raises(ValueError, match="one document each"), AttentionRecorder(mac):
        mac(ids, document_ids=documents)
    other = other_model("llama")
    other.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="set attn_implementation to 'sdpa'"), AttentionRecorder(other):
        pass
    model.activation_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="gradient_checkpointing"), AttentionRecorder(model):
        pass
