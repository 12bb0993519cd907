"""Mistral: Llama with a sliding window in every layer, or in none."""

from transformers import PreTrainedConfig

from .family import Family, Settings


def _settings(config: PreTrainedConfig) -> Settings:
    window = config.sliding_window
    return dict(sliding_windows=None if window is None else [window] * config.num_hidden_layers)


MISTRAL = Family("mistral", _settings)
