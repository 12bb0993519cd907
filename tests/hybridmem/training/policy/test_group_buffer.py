"""Dynamic sampling keeps groups with signal, checkpoints them, and stops if none is found."""

import csv
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from hybridmem.data.trainer_state import batches_trained
from hybridmem.rl.rollouts.completions import Completions
from hybridmem.rl.rollouts.experience import Rollout
from hybridmem.rl.rollouts.prompts import Prompt
from hybridmem.training.errors import StoppedError
from hybridmem.training.policy.group_buffer import GroupBuffer, SignalWatch
from tests.hybridmem.training.runs import hybridmem, logged, weights

from .test_module import Letters, write_config

DAPO = [{"class_path": "hybridmem.rl.DAPO"}]


def rollout(*groups: list[float]) -> Rollout:
    """Return groups with these rewards; a response's first token is its index."""
    rewards = torch.tensor([reward for group in groups for reward in group], dtype=torch.float32)
    count = len(rewards)
    ids = torch.arange(count)[:, None].repeat(1, 2)
    completions = Completions(ids, torch.ones(count, 2) > 0, torch.zeros(count) > 0, torch.zeros(count, 2))
    return Rollout([Prompt([number]) for number in range(len(groups))], completions, rewards)


def test_a_batch_fills_over_rollouts():
    buffer = GroupBuffer(2, 0)
    assert buffer.fill(rollout([0, 1], [0.1, 0.1], [1, 1])) is None
    assert buffer.num_waiting == 2
    assert buffer.fill(rollout([0, 0], [0, 0], [1, 0])) is None
    full = buffer.fill(rollout([1, 0], [0, 2], [1, 3]))
    assert [prompt.tokens for prompt in full.prompts] == [[0], [2], [0]]
    assert full.rewards.tolist() == [0, 1, 1, 0, 1, 0]
    assert full.completions.ids[:, 0].tolist() == [0, 1, 4, 5, 0, 1]


def test_waiting_groups_go_through_a_checkpoint(tmp_path):
    whole, resumed = GroupBuffer(2, 0), GroupBuffer(2, 0)
    whole.fill(rollout([0, 1], [1, 1], [0, 0]))
    torch.save(whole.state_dict(), tmp_path / "state")
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    after = rollout([0, 1], [1, 0], [2, 2])
    first, second = whole.fill(after), resumed.fill(after)
    assert first.prompts == second.prompts
    for one, other in zip(first.completions, second.completions, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="waiting groups of 2 responses; resume with num_generations=2"):
        GroupBuffer(3, 0).load_state_dict(torch.load(tmp_path / "state", weights_only=True))


@pytest.mark.parametrize("endless", [True, False])
def test_a_warning_then_an_end(endless):
    watch = SignalWatch(3, 2, ["judge"], endless)
    equal, different = torch.tensor([0.5, 0.5, 1.0, 1.0]), torch.tensor([0.5, 0.5, 1.0, 0.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rewards in (equal, equal, different, equal, equal):
            watch.look(rewards)
    with pytest.warns(UserWarning, match=r"3 consecutive rollouts, judge gave .* same reward \(0.5, 1\)"):
        watch.look(equal)
    for _ in range(26):
        watch.look(equal)
    if endless:
        with pytest.raises(StoppedError, match="in 30 consecutive rollouts, judge"):
            watch.look(equal)
    else:
        watch.look(equal)


class Tenth(Letters):
    """Task with equal rewards whose floating-point mean is inexact."""

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return a tenth."""
        return [0.1] * len(completions)


class Rare(Letters):
    """Task in which few groups have a signal."""

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return 1 for one of eleven first letters."""
        return [float(bool(text) and ord(text[0]) % 11 == 0) for text in completions]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_dynamic_sampling_without_signal_ends(tmp_path, monkeypatch, capsys):
    config = write_config(
        tmp_path,
        data__init_args__task=f"{__name__}.Tenth",
        model__init_args__objectives=DAPO,
        model__init_args__max_empty_rollouts=1,
    )
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", config)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "in 10 consecutive rollouts, reward gave all responses of each group the same reward (0.1)" in said


class SaveAfterSeven(L.Callback):
    """Callback that saves a checkpoint after seven rollouts."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save the checkpoint."""
        if batches_trained(trainer) == 7:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "seven.ckpt")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_rollouts_without_signal_are_counted_across_restarts(tmp_path, monkeypatch, capsys):
    config = write_config(
        tmp_path,
        data__init_args__task=f"{__name__}.Tenth",
        trainer__callbacks=[{"class_path": f"{__name__}.SaveAfterSeven"}],
        trainer__enable_checkpointing=False,
        model__init_args__objectives=DAPO,
        model__init_args__max_empty_rollouts=1,
    )
    for again in ([], ["--ckpt_path", tmp_path / "run" / "seven.ckpt"]):
        with pytest.raises(SystemExit):
            hybridmem(monkeypatch, "fit", "--config", config, *again)
        assert "in 10 consecutive rollouts" in capsys.readouterr().err
    with (tmp_path / "run" / "csv" / "version_1" / "metrics.csv").open() as resumed:
        rollouts = [row for row in csv.DictReader(resumed) if row["dynamic_sampling/waiting"]]
    assert len(rollouts) == 2, "rollouts 8 and 9; the tenth stops the run"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_no_weight_moves_without_signal(scale, tmp_path, monkeypatch):
    objective = {"class_path": "hybridmem.rl.GRPO", "init_args": {"beta": 0.0, "scale_rewards": scale}}
    config = write_config(
        tmp_path,
        data__init_args__task=f"{__name__}.Tenth",
        model__init_args__objectives=[objective],
        model__init_args__optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0}},
    )
    hybridmem(monkeypatch, "fit", "--config", config)
    first, last = weights(tmp_path / "run" / "step=2.ckpt"), weights(tmp_path / "run" / "step=6.ckpt")
    assert set(logged(tmp_path, "grad_norm")) == {0.0}
    assert all(torch.equal(first[name], last[name]) for name in first)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_checkpoint_of_a_validation_resumes_with_the_waiting_groups(tmp_path, monkeypatch):
    save = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "val{step}", "save_top_k": -1, "monitor": "val/reward"},
    }
    settings = dict(
        data__init_args__task=f"{__name__}.Rare",
        data__init_args__batch_size=4,
        trainer__max_steps=8,
        trainer__val_check_interval=3,
        model__init_args__objectives=DAPO,
        model__init_args__num_generations=2,
        model__init_args__num_iterations=1,
    )
    config = write_config(tmp_path, trainer__callbacks=[save], **settings)
    hybridmem(monkeypatch, "fit", "--config", config)
    saved = sorted((tmp_path / "run").glob("val*.ckpt"))
    waiting = [len(torch.load(path, weights_only=True)["rollouts"]["waiting"]) for path in saved]
    assert any(waiting)
    place = saved[[count > 0 for count in waiting].index(True)]
    options = ["--ckpt_path", str(place), "--trainer.default_root_dir", str(tmp_path / "again")]
    hybridmem(monkeypatch, "fit", "--config", config, *options)
    latest = max(saved, key=lambda path: path.stat().st_mtime)
    assert latest != place
    again = weights(tmp_path / "again" / latest.name)
    assert all(torch.equal(value, again[name]) for name, value in weights(latest).items())
