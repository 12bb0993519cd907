"""Model cards of exported folders."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

from hybridmem import HybridMemConfig
from hybridmem.data import TaskDataModule, byte_tokenizer
from hybridmem.tasks import Recall
from hybridmem.training.checkpoints.model_card import model_card, public, training_facts
from tests.hybridmem.models import tiny_model


def facts(data=None, **metrics):
    return training_facts(data, metrics, "GRPO and AttentionRL")


def test_the_card_lists_data_steps_metrics_and_licence():
    data = TaskDataModule(Recall(), tokenizer="bytes", num_train=123)
    shown = facts(data, **{"val/accuracy": torch.tensor(0.123456), "train/tokens_per_second": torch.tensor(7.0)})
    card = model_card(
        HybridMemConfig(layer_types=["swa", "mac"], num_hidden_layers=2), {"facts": shown, "global_step": 40}, "mit"
    )
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert header["pipeline_tag"] == "text-generation"
    assert {"hybridmem", "swa", "mac"} == set(header["tags"])
    for row in (
        "data | Recall",
        "num_train | 123",
        "method | GRPO and AttentionRL",
        "optimiser steps | 40",
        "val/accuracy | 0.1235",
        "layer_types | swa, mac",
    ):
        assert f"| {row} |" in card
    assert "tokens_per_second" not in card


def test_unknown_facts_are_omitted():
    card = model_card(HybridMemConfig(), {})
    assert "license" not in yaml.safe_load(card.split("---")[1])
    assert "The checkpoint does not record its training data." in card
    assert "No metrics were logged." in card
    assert "not stated" in card
    assert "None |" not in card


def test_a_model_of_transformers_needs_no_package_of_ours():
    card = model_card(LlamaConfig(), {"global_step": 1})
    assert "pip install hybridmem" not in card
    assert "| model_type | llama |" in card


def test_paths_are_named_by_their_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "texts").mkdir(parents=True)
    assert public(str(tmp_path / "someone" / "texts")) == "texts"
    assert public(["someone/texts", "~/elsewhere/more"]) == ["texts", "more"]
    assert public("owner/dataset") == "owner/dataset"
    assert public(17) == 17


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_cards_example_runs(tmp_path, capsys):
    model, tokenizer = tiny_model(torch.float32, vocab_size=259), byte_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", model_card(model.config, {}), re.S)
    exec(example.replace("path/to/this/folder", str(Path(tmp_path))), {})
    assert capsys.readouterr().out.startswith("def ")
