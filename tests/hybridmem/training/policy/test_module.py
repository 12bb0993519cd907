"""Reinforcement learning from the command line: learning, exact resumption and error messages."""

import json
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hybridmem import HybridMemForCausalLM
from hybridmem.data import TaskDataModule
from hybridmem.data.tokenizer import byte_tokenizer
from hybridmem.rl import DAPO, GRPO, AttentionDistillation, AttentionRL
from hybridmem.tasks.task import Split
from hybridmem.training import PolicyModule, WarmupCosine
from tests.hybridmem.models import tiny_config
from tests.hybridmem.training.runs import hybridmem, logged, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
ATTENTION = {"class_path": "hybridmem.rl.AttentionRL", "init_args": {}}
TOKENS = {"class_path": "hybridmem.rl.GRPO", "init_args": {"beta": 0.0}}


class Letters:
    """Task that rewards letters near the start of the alphabet, learnable in a few steps."""

    @property
    def max_completion_length(self) -> int:
        """Return room for two letters."""
        return 2

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return a prompt of a few letters."""
        return {"prompt": "bcde"[index % 4] * 4, "answer": "a"}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return the share of letters before m."""
        return [sum(letter < "m" for letter in text) / 2 for text in completions]


class Silent(Letters):
    """Task without differences in reward."""

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return zero rewards."""
        return [0.0] * len(completions)


def distillation(folder, vocab_size=259, tokenizer=None, **settings):
    """Return a distillation objective with a teacher of different heads and depth, saved in `folder`."""
    torch.manual_seed(1)
    shape = dict(hidden_size=24, intermediate_size=24, num_hidden_layers=3, num_attention_heads=6, head_dim=8)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **shape, initializer_range=0.3))
    teacher.save_pretrained(folder / "teacher")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "teacher")
    return distilling(folder / "teacher", **settings)


def distilling(teacher, **settings):
    """Return a distillation objective with a teacher."""
    return {"class_path": "hybridmem.rl.AttentionDistillation", "init_args": {"teacher": str(teacher), **settings}}


def write_config(folder, model="ours", **changes):
    """Write a configuration of a few optimiser steps to `folder`."""
    torch.manual_seed(0)
    if model == "llama":
        shape = dict(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
        policy = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.1))
    else:
        policy = HybridMemForCausalLM(tiny_config(vocab_size=259, variant=model if model != "ours" else "mag"))
    policy.save_pretrained(folder / "policy")
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 6,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": str(folder / "run"),
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 2},
                }
            ],
        },
        "model": {
            "class_path": "hybridmem.training.PolicyModule",
            "init_args": {
                "model": str(folder / "policy"),
                "num_generations": 4,
                "num_iterations": 2,
                "objectives": [TOKENS, ATTENTION],
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "lr_scheduler": {"class_path": "hybridmem.training.WarmupCosine", "init_args": {"warmup_steps": 1}},
            },
        },
        "data": {
            "class_path": "hybridmem.data.TaskDataModule",
            "init_args": {"task": f"{__name__}.Letters", "mode": "prompts", "batch_size": 2, "num_val": 4},
        },
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        part = config
        for name in path:
            part = part[name]
        part[last] = value
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


SUPERVISED = {"class_path": "hybridmem.rl.SFT"}
WATCHED = [
    {"class_path": "hybridmem.training.AccuracyBy", "init_args": {"column": "answer"}},
    {"class_path": "hybridmem.training.ComputeSpent"},
]


@pytest.mark.parametrize("objectives", [[SUPERVISED], [TOKENS]])
def test_answers_and_rewards_train_on_the_same_terms(tmp_path, monkeypatch, objectives):
    changes = {"trainer__max_steps": 60, "trainer__callbacks": WATCHED, "model__init_args__num_iterations": 1}
    config = write_config(tmp_path, model__init_args__objectives=objectives, **changes)
    hybridmem(monkeypatch, "fit", "--config", config)
    accuracy = logged(tmp_path, "val/accuracy")
    assert logged(tmp_path, "val/accuracy_at/answer=a") == accuracy
    assert logged(tmp_path, "val/pass@1_at/answer=a") == logged(tmp_path, "val/pass@1")
    spent = json.loads((tmp_path / "run" / "compute.json").read_text())
    assert spent["steps"] == spent["batches"] == 60
    assert spent["flops"] > 0
    if objectives == [SUPERVISED]:
        assert accuracy[-1] == 1
        assert spent["tokens"] == 60 * 2 * (4 + 2)  # two prompts of four letters, with one letter and EOS each


def test_supervised_loss_is_that_of_pretraining(tmp_path, monkeypatch):
    config = write_config(tmp_path, model__init_args__objectives=[SUPERVISED], trainer__max_steps=2)
    hybridmem(monkeypatch, "fit", "--config", config, "--model.init_args.num_iterations", "1")
    model = HybridMemForCausalLM.from_pretrained(tmp_path / "policy")
    data = TaskDataModule(Letters(), batch_size=2)
    data.setup()
    rows = data.batch([data.task.example("train", index) for index in range(4)])
    logits = model(rows["input_ids"]).logits
    each = torch.nn.functional.cross_entropy(logits.mT, rows["shift_labels"], reduction="none").sum(1) / 2
    loss = logged(tmp_path, "loss")[0]
    assert any(abs((each[i] + each[j]).item() / 2 - loss) < 1e-5 for i in range(4) for j in range(4))


@pytest.mark.parametrize("model", ["ours", "llama", "mac"])
def test_a_run_trains_and_logs(tmp_path, monkeypatch, model):
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, model))
    for name in (
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "entropy",
        "grad_norm",
        "loss",
        "attention/divergence",
        "attention/effective_span",
        "val/reward",
        "val/accuracy",
        "val/pass@1",
    ):
        assert logged(tmp_path, name), name
    assert max(logged(tmp_path, "sampling/sampling_logp_difference/max")) < 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-12), ("32-true", 1e-5), ("bf16-mixed", 0.1)])
def test_scores_equal_the_samplers_with_lora_and_dropout(tmp_path, monkeypatch, precision, tolerance):
    lora = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.5}
    changes = dict(model__init_args__lora=lora, model__init_args__objectives=[TOKENS], trainer__precision=precision)
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, **changes))
    differences = logged(tmp_path, "sampling/sampling_logp_difference/max")
    assert len(differences) == 3
    assert max(differences) < tolerance


def test_the_reward_rises(tmp_path, monkeypatch):
    changes = dict(trainer__max_steps=60, data__init_args__batch_size=8, trainer__val_check_interval=30)
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, "llama", **changes))
    rewards = logged(tmp_path, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2


@pytest.mark.parametrize("objectives", ["both", "explored"])
def test_resumed_runs_equal_uninterrupted_ones(tmp_path, monkeypatch, objectives):
    changes = {}
    if objectives == "explored":
        explored = {**ATTENTION, "init_args": {"exploration": 0.5, "positions": "predicting"}}
        changes["model__init_args__objectives"] = [explored]
    config = write_config(tmp_path, **changes)
    hybridmem(monkeypatch, "fit", "--config", config)
    whole = weights(tmp_path / "run" / "step=6.ckpt")
    resumed = ("--ckpt_path", tmp_path / "run" / "step=2.ckpt", "--trainer.default_root_dir", tmp_path / "again")
    hybridmem(monkeypatch, "fit", "--config", config, *resumed)
    again = weights(tmp_path / "again" / "step=6.ckpt")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_dynamic_sampling_and_lora(tmp_path, monkeypatch):
    dapo = {"class_path": "hybridmem.rl.DAPO"}
    lora = {"r": 2, "target_modules": "all-linear"}
    changes = dict(model__init_args__objectives=[dapo], model__init_args__lora=lora)
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, "llama", **changes))
    state = weights(tmp_path / "run" / "step=6.ckpt")
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in state.items())


@pytest.mark.parametrize("model", ["ours", "llama"])
def test_adapters_resume_and_are_merged_on_export(tmp_path, monkeypatch, model):
    lora = {"r": 2, "target_modules": "all-linear"}
    config = write_config(tmp_path, model, model__init_args__lora=lora)
    hybridmem(monkeypatch, "fit", "--config", config)
    resumed = ("--ckpt_path", tmp_path / "run" / "step=2.ckpt", "--trainer.default_root_dir", tmp_path / "again")
    hybridmem(monkeypatch, "fit", "--config", config, *resumed)
    whole, again = (weights(tmp_path / run / "step=6.ckpt") for run in ("run", "again"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    exported = tmp_path / "exported"
    hybridmem(monkeypatch, "export", "--ckpt_path", tmp_path / "run" / "step=6.ckpt", "--output", exported)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "policy", exported))
    ids = torch.arange(9)[None]
    assert (before(ids).logits - after(ids).logits).abs().max() > 1e-4


def test_a_reference_model_bounds_the_divergence(tmp_path, monkeypatch):
    changes = dict(model__init_args__objectives=[{**TOKENS, "init_args": {"beta": 0.1}}])
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, **changes))
    assert logged(tmp_path, "kl")[-1] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model__init_args__num_generations=1), "num_generations=1 gives every response an advantage of 0"),
        (dict(model__init_args__num_iterations=1), "AttentionRL's gradient is zero"),
        (dict(model__init_args__objectives=[]), "objectives is empty"),
        (dict(data__init_args__mode="supervised"), "set data.init_args.mode to prompts"),
        (dict(trainer__max_steps=-1), "trainer.max_steps=-1 must be at least 1"),
        (dict(model__init_args__model="/no/such/folder"), "/no/such/folder"),
        (dict(model__init_args__model="a: b"), "model: Repo id must use alphanumeric chars"),
        (dict(model__init_args__lora={}), "lora={} is not accepted by PEFT's LoraConfig: Please specify"),
    ],
)
def test_settings_that_cannot_work_stop_before_training(tmp_path, monkeypatch, capsys, changes, message):
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, **changes))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_one_step_is_enough_for_exploration_and_tokens():
    PolicyModule("x", [AttentionRL(exploration=0.5)], num_iterations=1)
    PolicyModule("x", [GRPO()], num_iterations=1)
    with pytest.raises(ValueError, match="exploration is incompatible with dynamic_sampling"):
        PolicyModule("x", [DAPO(), AttentionRL(exploration=0.5)])


def test_a_fast_dev_run_is_no_shorter_than_the_warm_up(tmp_path, monkeypatch, caplog):
    config = write_config(tmp_path, model__init_args__lr_scheduler__init_args__warmup_steps=4)
    hybridmem(monkeypatch, "fit", "--config", config, "--trainer.fast_dev_run", "true")
    assert "`max_steps=1` reached" in caplog.text


def test_distillation_needs_neither_rewards_nor_groups(tmp_path, monkeypatch):
    """A student learns its teacher's sharp attention without any reward."""
    changes = dict(
        model__init_args__objectives=[distilling(tmp_path / "teacher", mu=0.0, gamma=1.0)],
        model__init_args__optimizer__init_args__lr=0.003,
        model__init_args__max_completion_length=6,
        model__init_args__num_generations=1,
        model__init_args__num_iterations=4,
        data__init_args__task=f"{__name__}.Silent",
        data__init_args__batch_size=32,
        trainer__max_steps=40,
        trainer__val_check_interval=10,
    )
    config = write_config(tmp_path, "llama", **changes)
    teacher = LlamaForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        teacher.model.layers[-1].self_attn.q_proj.weight.mul_(30)
    teacher.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    hybridmem(monkeypatch, "fit", "--config", config)
    assert set(logged(tmp_path, "reward")) == {0.0}
    divergence = logged(tmp_path, "distillation/attention_divergence")
    assert divergence[-1] < 0.75 * divergence[0]
    state = weights(tmp_path / "run" / "step=40.ckpt")
    assert state.keys() == {f"model.{name}" for name in teacher.state_dict()}  # only the student's weights


@pytest.mark.parametrize("model", ["ours", "llama"])
def test_distillation_with_other_objectives(tmp_path, monkeypatch, model):
    """Distillation in several steps per pass, and with LoRA on a model of another family."""
    changes: dict[str, Any] = dict(
        model__init_args__objectives=[TOKENS, ATTENTION, distillation(tmp_path)],
        model__init_args__steps_per_generation=2,
    )
    if model == "llama":
        changes["model__init_args__lora"] = {"r": 2, "target_modules": "all-linear"}
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, model, **changes))
    for name in ("attention/divergence", "distillation/gkd", "distillation/attention_divergence", "reward_std"):
        assert logged(tmp_path, name), name


def test_a_checkpoint_teaches(tmp_path, monkeypatch):
    (tmp_path / "first").mkdir()
    short = dict(trainer__max_steps=2, trainer__val_check_interval=2)
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path / "first", **short))
    objectives = [distilling(tmp_path / "first" / "run" / "step=2.ckpt")]
    config = write_config(tmp_path, **short, model__init_args__objectives=objectives)
    hybridmem(monkeypatch, "fit", "--config", config)
    assert logged(tmp_path, "distillation/gkd")[0] < 0.01  # student and teacher were equal two steps ago


def other_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["word"])
    return tokenizer


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda folder: distillation(folder, tokenizer=other_tokenizer()), "differs from the data's in"),
        (lambda folder: distillation(folder, vocab_size=300), "vocab_size=300, but the student has 259"),
        (lambda folder: distillation(folder, teacher_layer=7), "teacher_layer=7 is out of range"),
        (lambda folder: distilling("/no/such/folder"), "objectives.0.init_args.teacher=/no/such/folder does not exist"),
        (lambda folder: distilling("/no/such.ckpt"), "objectives.0.init_args.teacher=/no/such.ckpt does not exist"),
        (lambda folder: distilling("x", beta=2.0), "beta=2.0 must be between 0"),
    ],
)
def test_teachers_that_cannot_teach_stop_before_training(tmp_path, monkeypatch, capsys, objective, message):
    config = write_config(tmp_path, model__init_args__objectives=[objective(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", config)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_group_of_one_is_enough_for_distillation_alone():
    distil = AttentionDistillation(teacher="x")
    PolicyModule("x", [distil], num_generations=1)
    with pytest.raises(ValueError, match="num_generations=1 gives every response an advantage of 0"):
        PolicyModule("x", [distil, GRPO()], num_generations=1)
    with pytest.raises(ValueError, match="objectives has 2 of family AttentionDistillation"):
        PolicyModule("x", [distil, distil])


class Generous(Letters):
    """Task that rewards every response with 99."""

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return 99 for every response."""
        return [99.0] * len(completions)


def test_a_second_data_module_is_read_with_its_own_rewards(tmp_path):
    write_config(tmp_path)
    schedule = partial(WarmupCosine, warmup_steps=0)
    module = PolicyModule(str(tmp_path / "policy"), [GRPO(beta=0.0)], num_generations=2, lr_scheduler=schedule)
    settings = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = [TaskDataModule(task, mode="prompts", batch_size=2, num_val=2) for task in (Letters(), Generous())]
    L.Trainer(max_steps=1, limit_val_batches=0, enable_model_summary=False, **settings).fit(module, data[0])
    (found,) = L.Trainer(**settings).validate(module, data[1], verbose=False)
    assert found["val/reward"] == 99
    assert module.worker.policy.data is data[1]


def test_only_solved_responses_are_learnt_from_outside_environments(tmp_path, monkeypatch):
    objective = {"class_path": "hybridmem.rl.RejectionFineTune"}
    config = write_config(
        tmp_path, model__init_args__objectives=[objective], data__init_args__task=f"{__name__}.Silent"
    )
    hybridmem(monkeypatch, "fit", "--config", config)
    assert set(logged(tmp_path, "rejection/kept")) == {0.0}
    assert set(logged(tmp_path, "grad_norm")) == {0.0}


def test_a_checkpoint_is_validated_with_other_groups(tmp_path, monkeypatch):
    dapo = [{"class_path": "hybridmem.rl.DAPO"}]
    config = write_config(tmp_path, model__init_args__objectives=dapo, trainer__max_steps=2)
    hybridmem(monkeypatch, "fit", "--config", config)
    path = tmp_path / "run" / "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    completions = (torch.zeros(4, 1).long(), torch.ones(4, 1) > 0, torch.zeros(4) > 0, torch.zeros(4, 1))
    waits = {"prompt": ([1], None, None), "completions": completions, "rewards": torch.zeros(4), "kept": None}
    checkpoint["rollouts"]["waiting"] = [waits]
    torch.save(checkpoint, path)
    path.with_name(path.name + ".sha256").unlink(missing_ok=True)
    hybridmem(
        monkeypatch, "validate", "--config", config, "--ckpt_path", str(path), "--model.init_args.num_generations", "8"
    )


def test_a_policy_is_tested_on_a_task(tmp_path, monkeypatch):
    task = {
        "class_path": "hybridmem.tasks.Ruler",
        "init_args": {"num_tokens": 300, "subtasks": ["single", "variables"]},
    }
    watched = [{"class_path": "hybridmem.training.AccuracyBy", "init_args": {"column": "subtask"}}]
    config = write_config(
        tmp_path, data__init_args__task=task, trainer__callbacks=watched, model__init_args__max_completion_length=4
    )
    hybridmem(monkeypatch, "test", "--config", config)
    assert logged(tmp_path, "test/reward") == [0.0]
    assert logged(tmp_path, "test/accuracy_at/subtask=single") == [0.0]
    assert logged(tmp_path, "test/accuracy_at/subtask=variables") == [0.0]
