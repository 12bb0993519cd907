"""Folders of tiny models as `hybridmem export` writes them."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.cli.export import export


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[[str], Path]:
    """The exported folder of a variant; windows, segments and chunks are shorter than the tests' texts."""

    @functools.cache
    def folder(variant: str) -> Path:
        config = HybridMemConfig(
            variant=variant, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=6, attention_window=7, segment_length=12, num_persistent_tokens=2,
            memory_heads=2, memory_head_dim=8, memory_chunk_size=8, initializer_range=0.3,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = HybridMemForCausalLM(config).state_dict()
        place = tmp_path_factory.mktemp(variant)
        checkpoint = {
            "hybridmem_config": config.to_dict(),
            "tokenizer": "bytes",
            "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
        }
        torch.save(checkpoint, place / "last.ckpt")
        export(place / "last.ckpt", place / "model")
        return place / "model"

    return folder
