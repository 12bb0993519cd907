"""Llama and models with its architecture, such as SmolLM2."""

from transformers import PreTrainedConfig

from .family import Family, Settings


def _settings(config: PreTrainedConfig) -> Settings:
    bias = config.attention_bias
    return dict(attention_bias=bias, attention_output_bias=bias, mlp_bias=config.mlp_bias)


LLAMA = Family("llama", _settings)
