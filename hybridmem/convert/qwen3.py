"""Qwen3: normalised queries and keys; sliding windows in some layers."""

from transformers import PreTrainedConfig

from .family import Family, Settings, sliding_layers


def _settings(config: PreTrainedConfig) -> Settings:
    bias = config.attention_bias
    return dict(attention_bias=bias, attention_output_bias=bias, qk_norm=True, sliding_windows=sliding_layers(config))


QWEN3 = Family("qwen3", _settings)
