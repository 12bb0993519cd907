"""TRL's trainers on exported models of every variant, whose saved models load again."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.hybridmem.models import FOLDERS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

TEXTS = [f"the {n} of {n * 7919 % 100} is {n % 3}\n" * 2 for n in range(8)]
SETTINGS = dict(
    use_cpu=True,
    bf16=False,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    logging_steps=1,
    per_device_train_batch_size=4,
    learning_rate=0.01,
    max_steps=3,
)
IDS = torch.arange(32, 64)[None]


def train(trainer) -> list[dict]:
    """Train, check that losses are finite and weights change, and return the log of each step."""
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == SETTINGS["max_steps"]
    assert all(math.isfinite(step["loss"]) for step in steps)
    after = dict(trainer.model.named_parameters())
    assert sum(not torch.equal(after[name], weight) for name, weight in before.items()) > len(before) * 0.9
    return steps


def loads_again(trainer, folder) -> None:
    trainer.save_model(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, trainer.model.eval()(IDS).logits)


@pytest.mark.parametrize("variant", FOLDERS)
def test_sft(variant, exported, tmp_path):
    settings = SFTConfig(output_dir=tmp_path, dataset_text_field="text", **SETTINGS)
    trainer = SFTTrainer(str(exported(variant)), args=settings, train_dataset=Dataset.from_dict({"text": TEXTS}))
    steps = train(trainer)
    assert steps[-1]["loss"] < steps[0]["loss"]
    loads_again(trainer, tmp_path / "saved")


# Documents are separated once for all layers, so one variant suffices: the one with memory, window and segments.
@pytest.mark.parametrize("variant", ["mac"])
def test_sft_without_padding_keeps_documents_apart(variant, exported, tmp_path):
    """TRL concatenates a batch's rows, and only the positions show the start of each."""
    losses = []
    for padding_free in (False, True):
        settings = SFTConfig(tmp_path, max_length=None, padding_free=padding_free, **SETTINGS | dict(max_steps=1))
        data = Dataset.from_dict({"text": [text[: 9 + n] for n, text in enumerate(TEXTS)]})
        trainer = SFTTrainer(str(exported(variant)), args=settings, train_dataset=data)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("variant", FOLDERS)
def test_dpo(variant, exported, tmp_path):
    settings = DPOConfig(output_dir=tmp_path, **SETTINGS)
    rows = [{"prompt": text[:8], "chosen": text[8:], "rejected": text[:7:-1]} for text in TEXTS]
    trainer = DPOTrainer(str(exported(variant)), args=settings, train_dataset=Dataset.from_list(rows))
    steps = train(trainer)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)  # policy and reference are equal at the start
    assert steps[-1]["rewards/margins"] > 0
    loads_again(trainer, tmp_path / "saved")


def variety(completion_ids, **_):
    """Return rewards that almost always differ within a group."""
    return [sum(ids) / 100 for ids in completion_ids]


def grpo(folder, tmp_path, **settings) -> GRPOTrainer:
    """Return a trainer with a reference model and activation checkpointing, TRL's default."""
    adapter = settings.pop("peft_config", None)
    arguments = GRPOConfig(
        output_dir=tmp_path, num_generations=4, max_completion_length=8, beta=0.1, **SETTINGS, **settings
    )
    return GRPOTrainer(
        str(folder),
        variety,
        arguments,
        Dataset.from_dict({"prompt": [text[:11] for text in TEXTS]}),
        peft_config=adapter,
    )


@pytest.mark.parametrize("variant", FOLDERS)
def test_grpo_with_a_reference_model(variant, exported, tmp_path):
    trainer = grpo(exported(variant), tmp_path)
    steps = train(trainer)
    assert trainer.model.is_activation_checkpointing
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["kl"] > 0
    loads_again(trainer, tmp_path / "saved")


# Adapters wrap linear layers, and these two variants have all kinds of them.
@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_grpo_of_an_adapter(variant, exported, tmp_path):
    """The reference model is the model without its adapter."""
    trainer = grpo(exported(variant), tmp_path, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    steps = train(trainer)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["kl"] > 0
