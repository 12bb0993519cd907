import pytest
import torch
from transformers import DynamicCache

from hybridmem import HybridMemForCausalLM
from hybridmem.convert import convert
from hybridmem.convert.memories import add_memories, every_head, route_writes
from hybridmem.rl.attention.routing import RouterPolicy, SettledRouting
from hybridmem.rl.attention.writes import find_memories
from tests.hybridmem.models import tiny_config, tiny_model, tokens

from .bases import base_model, texts

MIXED = [["memory", "full"], ["none", "none"]]


def converted(**options):
    return convert(base_model(dtype=torch.float32), attention_window=7, num_sink_tokens=2, **options)


def test_layers_that_read_one_get_memories():
    model = converted()
    add_memories(model, MIXED, {"memory_depth": 2, "memory_momentum": False})
    assert [layer.mixer.memory is not None for layer in model.model.layers] == [True, False]
    memory = model.model.layers[0].mixer.memory
    assert len(memory.initial_weights) == 2
    assert memory.eta_logit is None
    assert model.config.head_sources == MIXED
    assert (model.config.memory_depth, model.config.memory_momentum) == (2, False)


def test_new_memories_equal_those_of_the_conversion():
    model = converted()
    add_memories(model, "memory")
    other = converted(head_source="memory")
    ids = texts()
    torch.testing.assert_close(model(ids).logits, other(ids).logits, rtol=0, atol=0)


def test_existing_memories_stay():
    model = converted(head_source=MIXED)
    memory = model.model.layers[0].mixer.memory
    memory.q_map.weight.data += 1
    add_memories(model, "memory", {"memory_depth": 1})
    assert model.model.layers[0].mixer.memory is memory
    assert model.model.layers[1].mixer.memory is not None
    with pytest.raises(ValueError, match="the model's memories have memory_depth=1; leave it out"):
        add_memories(model, "memory", {"memory_depth": 2})


def test_errors():
    model = converted()
    with pytest.raises(ValueError, match="head_sources='some' is unknown"):
        every_head(model.config, "some")
    with pytest.raises(ValueError, match=r"head_sources\[0\] names 1 sources but num_key_value_heads=2"):
        add_memories(model, [["memory"], ["memory"]])
    for name in ("hidden_size", "memory_width"):
        with pytest.raises(ValueError, match=f"{name} is not a memory setting of HybridMemConfig"):
            add_memories(model, "memory", {name: 3})
    with pytest.raises(ValueError, match="layer_types holds mag: memories need a converted model"):
        add_memories(tiny_model(variant="mag"), "memory")


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [dict(variant="mag"), dict(variant="mah", head_sources=[["full", "none"], ["none", "memory"]])]
)
def test_a_model_with_a_router_stores_tokens_by_its_rule(settings, tmp_path):
    model, rows = tiny_model(**settings), tokens(2, 24)
    units = find_memories(model)
    policy = RouterPolicy(len(units.layers), 1, 16, 0.5)
    policy.weight.copy_(20 * torch.randn(policy.weight.shape, generator=torch.Generator().manual_seed(0)))
    everything = model(rows).logits
    with SettledRouting(policy.double(), units).applied(model):
        wanted = model(rows).logits
    assert (wanted - everything).abs().max() > 1e-3
    route_writes(model, units.layers, policy.weight, policy.bias)
    model.save_pretrained(tmp_path)
    loaded = HybridMemForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(rows).logits, wanted)
    cache = DynamicCache(config=loaded.config)
    parts = [loaded(part, past_key_values=cache).logits for part in rows.split((9, *[1] * 15), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), wanted)


def test_a_new_router_stores_every_token():
    plain, routed = (tiny_model(variant="mag", memory_router=router) for router in (False, True))
    routed.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(routed(tokens()).logits, plain(tokens()).logits)


def test_memories_that_store_every_token_have_no_router():
    for settings in (dict(variant="mag", memory_depth=2), dict(variant="mac")):
        with pytest.raises(Exception, match="memory_router=True needs memory_depth=1"):
            tiny_config(memory_router=True, **settings)
