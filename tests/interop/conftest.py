"""Exported folders of tiny models."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.cli.export import export
from hybridmem.convert import convert_folder
from hybridmem.data import byte_tokenizer
from tests.hybridmem.convert.bases import base_model


def converted(place: Path) -> Path:
    """Return a converted Llama with heads of every source."""
    with torch.random.fork_rng():
        special = dict(pad_token_id=256, bos_token_id=257, eos_token_id=258)
        base_model("llama", dtype=torch.float32, vocab_size=259, **special).save_pretrained(place / "base")
    byte_tokenizer().save_pretrained(place / "base")
    sources = [["full", "memory"], ["none", "memory"]]
    convert_folder(place / "base", place / "model", attention_window=7, num_sink_tokens=2, head_source=sources)
    return place / "model"


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[[str], Path]:
    """Export a variant whose windows, segments and chunks are shorter than the tests' texts."""

    @functools.cache
    def folder(variant: str) -> Path:
        if variant == "converted":
            return converted(tmp_path_factory.mktemp(variant))
        config = HybridMemConfig(
            variant=variant,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            attention_window=7,
            segment_length=12,
            num_persistent_tokens=2,
            memory_heads=2,
            memory_head_dim=8,
            memory_chunk_size=8,
            initializer_range=0.3,
        )
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
