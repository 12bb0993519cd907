"""Stopped and resumed runs see the batches of an uninterrupted run, for any stop."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from hybridmem.data import TextDataModule

from .helpers import LIGHTNING_WARNINGS, Recorder, trainer, write_files

pytestmark = LIGHTNING_WARNINGS
STEPS = 12
VALIDATED = {"limit_val_batches": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


def data(folder, **options) -> TextDataModule:
    settings = dict(path=str(folder), sequence_length=100, batch_size=8, val_fraction=0.2)
    return TextDataModule(**{**settings, **options})


def batches_per_epoch(folder, **options) -> int:
    module = data(folder, **options)
    module.setup("fit")
    return len(module.train_dataloader())


def train(folder, tmp_path, max_steps, ckpt_path=None, data_options=None, fails_at=None, **options):
    recorder = Recorder(fails_at)
    run = trainer(tmp_path, max_steps=max_steps, **{"limit_val_batches": 0, **options})
    run.fit(recorder, data(folder, **(data_options or {})), ckpt_path=ckpt_path)
    return run, recorder.seen


def checkpoint(tmp_path, **options) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=tmp_path / "saved", save_top_k=-1, filename="{step}", **options)


@pytest.mark.parametrize("mode", ["packed", "continuous"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_mid_epoch_and_at_its_end(folder, tmp_path, mode, num_workers):
    options = {"mode": mode}
    n = batches_per_epoch(folder, **options)
    assert 2 < n < STEPS / 2
    everything = train(folder, tmp_path, STEPS, data_options=options)[1]
    options["num_workers"] = num_workers
    saver = checkpoint(tmp_path, every_n_train_steps=1, save_on_train_epoch_end=False)
    train(folder, tmp_path, n + 1, data_options=options, callbacks=[saver])
    for stop in (1, n, n + 1):  # within the first epoch, after its last batch, within the second
        path = tmp_path / "saved" / f"step={stop}.ckpt"
        assert train(folder, tmp_path, STEPS, path, options)[1] == everything[stop:], stop


def stop_at_epoch_end(folder, tmp_path, n):
    saver = checkpoint(tmp_path, every_n_epochs=1, save_on_train_epoch_end=True)
    return n, train(folder, tmp_path, -1, max_epochs=1, callbacks=[saver], **VALIDATED)


def stop_at_validation_within_epoch(folder, tmp_path, n):
    saver = checkpoint(tmp_path, monitor="val", save_on_train_epoch_end=False)
    return n - 1, train(folder, tmp_path, n - 1, val_check_interval=n - 1, callbacks=[saver], **VALIDATED)


def stop_at_validation_after_epoch(folder, tmp_path, n):
    saver = checkpoint(tmp_path, monitor="val", save_on_train_epoch_end=False)
    return n, train(folder, tmp_path, n, callbacks=[saver], **VALIDATED)


@pytest.mark.parametrize("stop", [stop_at_epoch_end, stop_at_validation_within_epoch, stop_at_validation_after_epoch])
@pytest.mark.parametrize("by_epochs", [False, True])
def test_checkpoints_of_hooks(folder, tmp_path, stop, by_epochs):
    n = batches_per_epoch(folder)
    everything = train(folder, tmp_path, 4 * n)[1]
    steps, (run, _) = stop(folder, tmp_path, n)
    limits = {"max_steps": -1, "max_epochs": 4} if by_epochs else {"max_steps": 4 * n}
    seen = train(folder, tmp_path, ckpt_path=run.checkpoint_callback.best_model_path, **limits, **VALIDATED)[1]
    assert seen == everything[steps:]


def test_longer_than_first_planned(folder, tmp_path):
    """Lightning counts an epoch cut short by max_steps as complete, but the data module does not."""
    n = batches_per_epoch(folder)
    everything = train(folder, tmp_path, STEPS)[1]
    run, _ = train(folder, tmp_path, n - 1)
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert train(folder, tmp_path, STEPS, tmp_path / "last.ckpt")[1] == everything[n - 1 :]


def test_failed_batch_is_repeated(folder, tmp_path):
    everything = train(folder, tmp_path, STEPS)[1]
    with pytest.raises(RuntimeError, match="on purpose"):
        train(folder, tmp_path, STEPS, fails_at=2, callbacks=[OnExceptionCheckpoint(tmp_path, "failed")])
    assert train(folder, tmp_path, STEPS, tmp_path / "failed.ckpt")[1] == everything[2:]


@pytest.mark.parametrize(
    "options", [{"limit_train_batches": 2}, {"reload_dataloaders_every_n_epochs": 1}, {"accumulate_grad_batches": 2}]
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_trainer_settings_do_not_change_the_batches(folder, tmp_path, options, num_workers):
    everything = train(folder, tmp_path, STEPS)[1]
    steps = STEPS // options.get("accumulate_grad_batches", 1) // 2
    workers = {"num_workers": num_workers}
    run, seen = train(folder, tmp_path, steps, data_options=workers, **options)
    assert seen == everything[: len(seen)]
    run.save_checkpoint(tmp_path / "half.ckpt")
    rest = train(folder, tmp_path, 2 * steps, tmp_path / "half.ckpt", workers, **options)[1]
    assert rest == everything[len(seen) :][: len(rest)]
    assert len(rest) > 2


def test_batch_size_may_change(folder, tmp_path):
    rows = [row for batch in train(folder, tmp_path, STEPS)[1] for row in batch]
    run, _ = train(folder, tmp_path, 4)
    run.save_checkpoint(tmp_path / "four.ckpt")
    seen = train(folder, tmp_path, 9, tmp_path / "four.ckpt", {"batch_size": 5})[1]
    assert [row for batch in seen for row in batch] == rows[4 * 8 : 4 * 8 + 5 * 5]


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3), (3, 4)])
def test_accumulation_may_change(folder, tmp_path, before, after):
    """Accumulation lengthens epochs, but keeps the sequence of batches."""
    n = batches_per_epoch(folder)
    everything = train(folder, tmp_path, 6 * n)[1]
    for steps in (2, -(-n // before)):  # within an epoch and at its end
        run, seen = train(folder, tmp_path, steps, accumulate_grad_batches=before)
        assert seen == everything[: steps * before]
        run.save_checkpoint(tmp_path / "saved.ckpt")
        options = dict(accumulate_grad_batches=after, ckpt_path=tmp_path / "saved.ckpt")
        rest = train(folder, tmp_path, steps + 3, **options)[1]
        assert rest == everything[len(seen) :][: len(rest)]
        assert 2 * after < len(rest) <= 3 * after  # the first step extends to the next multiple of `after`


def test_lanes_may_not_change(folder, tmp_path):
    run, _ = train(folder, tmp_path, 2, data_options={"mode": "continuous"})
    run.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"'lanes': 8.*'lanes': 4"):
        train(folder, tmp_path, 4, tmp_path / "two.ckpt", {"mode": "continuous", "batch_size": 4})


def test_other_data_is_refused(folder, tmp_path):
    run, _ = train(folder, tmp_path, 2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="resume with the checkpoint's data settings and files"):
        train(folder, tmp_path, 4, tmp_path / "two.ckpt", {"seed": 1})
    run.validate(Recorder(), data(folder, seed=1), ckpt_path=tmp_path / "two.ckpt", verbose=False)


def test_validation_is_the_same_every_time(folder, tmp_path):
    for mode in ("packed", "continuous"):
        recorder = Recorder()
        trainer(tmp_path, max_epochs=2).fit(recorder, data(folder, mode=mode))
        half = len(recorder.validated) // 2
        assert recorder.validated[:half] == recorder.validated[half:]
