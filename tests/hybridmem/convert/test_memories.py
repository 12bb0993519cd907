import pytest
import torch

from hybridmem.convert import convert
from hybridmem.convert.memories import add_memories, every_head
from tests.hybridmem.models import tiny_model

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
