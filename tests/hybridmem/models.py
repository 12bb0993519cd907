"""Tiny models for the tests."""

import torch

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.model.memory import HeadMemory

VARIANTS = ("mac", "mag", "mal", "lmm", "swa", "full")
FOLDERS = (*VARIANTS, "converted")  # models for the tests with other libraries
# Every variant, memories of depth 1 and 2, and layers of different kinds.
KINDS = {
    **{variant: dict(variant=variant) for variant in VARIANTS},
    **{f"{variant} depth 2": dict(variant=variant, memory_depth=2) for variant in ("mac", "mag", "mal", "lmm")},
    "mag depth 3": dict(variant="mag", memory_depth=3, memory_expansion=2),
    "mixed": dict(layer_types=["swa", "mag", "mac"], num_hidden_layers=3),
    "mah": dict(variant="mah", head_sources=[["full", "memory"], ["none", "memory"]], num_sink_tokens=2),
    "mah depth 2": dict(variant="mah", head_sources=[["memory", "none"], ["full", "memory"]], memory_depth=2),
    "mah like a base model": dict(
        variant="mah",
        head_sources=[["full", "none"], ["full", "full"]],
        sliding_windows=[9, None],
        num_sink_tokens=1,
        qk_norm=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=dict(rope_type="linear", factor=2.0),
    ),
    "with attention_conv": dict(layer_types=["swa", "full"], attention_conv=True),
}


def tiny_config(**changes) -> HybridMemConfig:
    """Return a configuration with short windows, segments and chunks that do not align."""
    settings = dict(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        attention_window=7,
        segment_length=6,
        num_persistent_tokens=2,
        memory_heads=2,
        memory_head_dim=8,
        memory_chunk_size=8,
    )
    return HybridMemConfig(**settings | changes)


def tiny_model(dtype=torch.float64, seed=0, **changes) -> HybridMemForCausalLM:
    """Return a model with weights large enough for every part to matter."""
    torch.manual_seed(seed)
    model = HybridMemForCausalLM(tiny_config(initializer_range=0.3, **changes))
    for module in model.modules():
        if isinstance(module, HeadMemory):
            for parameter in module.parameters():
                parameter.data += torch.randn_like(parameter) * 0.3
            module.mixing_gate.bias.data -= 4
    return model.to(dtype).eval()


def tokens(batch=2, time=40, seed=1):
    return torch.randint(0, 37, (batch, time), generator=torch.Generator().manual_seed(seed))
