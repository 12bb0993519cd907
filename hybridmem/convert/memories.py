"""Memories of converted models."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hybridmem.model.configuration import HEAD_SOURCES, HybridMemConfig, check_head_sources
from hybridmem.model.heads import HeadMixer
from hybridmem.model.memory import HeadMemory, WriteRouter
from hybridmem.model.modeling import HybridMemForCausalLM

from .allocation import Allocation

Sources = str | list[list[str]]


def every_head(config: HybridMemConfig, source: Sources) -> list[list[str]]:
    """Return the sources of all layers; a single name applies to all heads.

    Raises:
        ValueError: a name is unknown, a list has the wrong shape, or a layer is not `mah`.
    """
    others = sorted(set(config.layer_types or ()) - {"mah"})
    if others:
        raise ValueError(f"layer_types holds {', '.join(others)}: memories need a converted model with only mah layers")
    if isinstance(source, str):
        if source not in HEAD_SOURCES:
            raise ValueError(f"head_sources={source!r} is unknown: choose one of {', '.join(HEAD_SOURCES)}")
        source = [[source] * config.num_key_value_heads for _ in range(config.num_hidden_layers)]
    check_head_sources(source, config)
    return [list(row) for row in source]


def add_memories(model: HybridMemForCausalLM, head_sources: Sources, settings: dict[str, Any] | None = None) -> None:
    """Set the sources of a converted model's heads, and add missing memories to its layers.

    New memories are float32 and initially close to plain window attention; existing memories are unchanged.

    Args:
        model: a converted model.
        head_sources: `full`, `memory` or `none` for all heads, or a list of these for each layer and KV head.
        settings: memory settings of HybridMemConfig, such as {"memory_depth": 2}.

    Raises:
        ValueError: the sources have the wrong shape, a setting is not a memory setting, or a setting contradicts the
            model's existing memories.
    """
    config = model.config
    sources = every_head(config, head_sources)
    mixers: list[Any] = [layer.mixer for layer in model.model.layers]
    for name, value in (settings or {}).items():
        if not name.startswith("memory_") or not hasattr(config, name):
            raise ValueError(f"memory={{{name!r}: {value!r}}}: {name} is not a memory setting of HybridMemConfig")
        if getattr(config, name) != value and any(mixer.memory is not None for mixer in mixers):
            raise ValueError(
                f"memory={{{name!r}: {value!r}}}: the model's memories have {name}={getattr(config, name)!r}; leave it "
                "out, or start from the base model"
            )
        setattr(config, name, value)
    config.validate()
    model.set_head_sources(sources)
    for number, (mixer, row) in enumerate(zip(mixers, sources, strict=True)):
        if "memory" in row and mixer.memory is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                memory = HeadMemory(config)
                memory.initialize()
            mixer.memory = memory.to(mixer.q_proj.weight.device)


def allocate(model: HybridMemForCausalLM, allocation: Allocation) -> None:
    """Set the sources of a converted model's heads permanently, and remove unused memories.

    Args:
        model: a converted model.
        allocation: the sources, and the window of heads other than `full`.

    Raises:
        ValueError: as in `Allocation.check`.
    """
    mixers = {n: layer.mixer for n, layer in enumerate(model.model.layers) if isinstance(layer.mixer, HeadMixer)}
    allocation.check(model.config, [layer for layer, mixer in mixers.items() if mixer.memory is not None])
    model.config.attention_window = allocation.attention_window
    model.config.num_sink_tokens = allocation.num_sink_tokens
    model.set_head_sources(allocation.head_sources)
    for layer, mixer in mixers.items():
        if "memory" not in allocation.head_sources[layer]:
            mixer.memory = None


def route_writes(
    model: HybridMemForCausalLM,
    layers: list[int],
    weight: Float[Tensor, "layers hidden"],
    bias: Float[Tensor, " layers"],
) -> None:
    """Make a model's memories store only the tokens that a router picks.

    Args:
        model: a model with memories.
        layers: numbers of the layers that the router decides for; other memories store every token.
        weight, bias: the router's parameters, see WriteRouter.
    """
    model.config.memory_router = True
    model.config.validate()
    for number, layer in enumerate(model.model.layers):
        memory: Any = getattr(layer.mixer, "memory", None)
        if memory is None:
            continue
        memory.router = WriteRouter(model.config.hidden_size).to(model.device)
        if number in layers:
            memory.router.weight.copy_(weight[layers.index(number)])
            memory.router.bias.copy_(bias[layers.index(number)])
