"""Tiny random models of all convertible families, and a float64 mode of transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 61
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(),
    "llama with biases": dict(attention_bias=True, mlp_bias=True, head_dim=12),
    "llama tied": dict(tie_word_embeddings=True, num_key_value_heads=4),
    "mistral": dict(sliding_window=None),
    "mistral sliding": dict(sliding_window=9, head_dim=12),
    "qwen2": dict(num_key_value_heads=1),
    "qwen2 sliding": dict(use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True),
    "qwen3": dict(head_dim=12),
    "qwen3 sliding": dict(
        head_dim=8,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
ROPES: dict[str, dict[str, Any]] = {
    "default": dict(rope_type="default", rope_theta=500.0),
    "linear": dict(rope_type="linear", factor=4.0, rope_theta=1000.0),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        rope_theta=500.0,
        original_max_position_embeddings=32,
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, rope_theta=1000.0, original_max_position_embeddings=64),
    "yarn with a factor": dict(
        rope_type="yarn",
        factor=4.0,
        rope_theta=1000.0,
        original_max_position_embeddings=64,
        attention_factor=0.8,
        beta_fast=16,
        beta_slow=2,
    ),
}


def base_config(family: str = "llama", rope: str = "default", **changes: Any) -> Any:
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        rms_norm_eps=1e-5,
        rope_parameters=dict(ROPES[rope]),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return AutoConfig.for_model(family.split()[0], **settings | FAMILIES[family] | changes)


def base_model(family: str = "llama", rope: str = "default", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a model with random biases and norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(base_config(family, rope, **changes))
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:
            parameter.data += torch.randn_like(parameter) * 0.2
    for parameter in model.parameters():  # unlike loading, `to` would also round the rotary frequencies
        parameter.data = parameter.data.to(dtype)
    return model.eval()


@contextmanager
def in_float64(model: PreTrainedModel) -> Iterator[None]:
    """Disable the float32 casts of transformers' norms and rotary embeddings, which also affect float64 models."""
    module = import_module(type(model).__module__)

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq.double()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    name = type(model).__name__.removesuffix("ForCausalLM")
    with (
        patch.object(getattr(module, f"{name}RMSNorm"), "forward", norm),
        patch.object(getattr(module, f"{name}RotaryEmbedding"), "forward", rotary),
    ):
        yield


def texts(batch: int = 2, time: int = 40, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))
