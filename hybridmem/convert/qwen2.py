"""Qwen2: biases on q, k and v; sliding windows in some layers."""

from transformers import PreTrainedConfig

from .family import Family, Settings, sliding_layers


def _settings(config: PreTrainedConfig) -> Settings:
    return dict(attention_bias=True, sliding_windows=sliding_layers(config))


QWEN2 = Family("qwen2", _settings)
