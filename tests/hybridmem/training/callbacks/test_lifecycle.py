"""Runs stopped by a signal save their full state, and resume as if uninterrupted."""

import os
import signal

import lightning as L
import pytest
import torch

from hybridmem.training import GracefulStop
from tests.hybridmem.data.helpers import Recorder, trainer
from tests.hybridmem.training.policy import test_module as test_policy
from tests.hybridmem.training.runs import hybridmem, logged, weights, write_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Signal(L.Callback):
    """Callback that signals its own process after some batches, and logs the start of validations in a file."""

    def __init__(self, batch: int, notes: str | None = None):
        self.batch, self.notes = batch, notes

    def on_train_batch_end(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_start(self, trainer, *_):
        with open(self.notes, "a") as notes:
            print(trainer.fit_loop.epoch_loop.batch_progress.total.processed, file=notes)


def stopped(monkeypatch, *arguments):
    """Run `hybridmem fit` until a signal stops it."""
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", *arguments)
    assert stopped.value.code == 128 + signal.SIGINT


@pytest.fixture(scope="module", params=[1, 3])
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        hybridmem(monkeypatch, "fit", "--config", interrupted(folder, request.param, batch=1000))
    return request.param, folder


def interrupted(folder, accumulate, batch):
    callbacks = [
        {"class_path": f"{__name__}.Signal", "init_args": {"batch": batch, "notes": str(folder / "notes.txt")}}
    ]
    callbacks.append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}})
    options = {"trainer__accumulate_grad_batches": accumulate, "trainer__val_check_interval": 4}
    return write_config(folder, trainer__callbacks=callbacks, trainer__enable_progress_bar=False, **options)


@pytest.mark.parametrize("batch", [2, 3, 4, 5])
def test_pretraining_stops_after_any_batch(uninterrupted, tmp_path, monkeypatch, batch):
    """This includes stops within an accumulation; validations are neither lost nor repeated, and steps are kept."""
    accumulate, whole = uninterrupted
    config = interrupted(tmp_path, accumulate, batch)
    stopped(monkeypatch, "--config", config)
    saved = tmp_path / "run" / "interrupted.ckpt"
    assert torch.load(saved, weights_only=True)["TextDataModule"]["batches"] == batch
    hybridmem(monkeypatch, "fit", "--config", config, "--ckpt_path", saved)
    ends = [weights(folder / "run" / "last.ckpt") for folder in (whole, tmp_path)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert logged(tmp_path, "train/loss") == logged(whole, "train/loss")
    assert (tmp_path / "notes.txt").read_text() == (whole / "notes.txt").read_text()


def no_reward(completions, **columns):
    """Return equal rewards, so that dynamic sampling never finds a group to learn from."""
    return [0.0] * len(completions)


def test_dynamic_sampling_that_finds_nothing_is_stopped(tmp_path, monkeypatch):
    signals = {"class_path": f"{__name__}.Signal", "init_args": {"batch": 2}}
    changes = {"model__init_args__objectives": [{"class_path": "hybridmem.rl.DAPO", "init_args": {}}]}
    changes |= {"model__init_args__reward_funcs": [f"{__name__}.no_reward"], "trainer__callbacks": [signals]}
    config = test_policy.write_config(tmp_path, trainer__limit_val_batches=0, **changes)
    stopped(monkeypatch, "--config", config)
    saved = torch.load(tmp_path / "run" / "interrupted.ckpt", weights_only=True)
    assert saved["global_step"] == 0
    assert saved["rollouts"]["count"] == 2


def test_a_module_that_saves_no_gradients_is_stopped_after_its_step(tmp_path, capsys):
    callbacks, batches = [Signal(2), GracefulStop()], torch.utils.data.DataLoader([*range(9)], batch_size=None)
    module = Recorder()
    module.training_step = lambda batch, batch_idx: module.seen.append(batch) or module.weight * 1.0
    run = trainer(tmp_path, max_steps=3, accumulate_grad_batches=3, limit_val_batches=0, callbacks=callbacks)
    with pytest.raises(SystemExit):
        run.fit(module, batches)
    assert module.seen == [0, 1, 2]
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == 1
