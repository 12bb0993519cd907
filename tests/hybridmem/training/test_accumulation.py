"""Gradient accumulation: the gradient of one large batch, full steps at epoch ends, and exact resumption."""

import re
from collections import defaultdict
from datetime import timedelta
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch.utils.data import DataLoader

from hybridmem.cli.consolidate import consolidate
from hybridmem.data import TaskDataModule, TextDataModule
from hybridmem.model.state import detach_state
from hybridmem.tasks.task import Split
from hybridmem.training import PretrainModule, RandomState, WarmupCosine
from hybridmem.training.accumulation import Accumulation, check_epochs
from hybridmem.training.checkpoints.loading import load_checkpoint
from tests.hybridmem.models import tiny_config
from tests.hybridmem.training.policy.test_several import SHARDED
from tests.hybridmem.training.runs import hybridmem, logged, write_config, write_text
from tests.several import fit as fit_several

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
ROWS, TIME, VOCABULARY = 8, 12, 37


class Lengths:
    """Task with answers of unequal lengths."""

    @property
    def max_completion_length(self) -> int:
        return 40

    def example(self, split: Split, index: int) -> dict[str, Any]:
        return {"prompt": "p ", "answer": "a" * (1 + 7 * (index % 5))}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)


class Steps(L.Callback):
    """Callback that records the initial weights, the loss of every optimiser step, and the number of batches."""

    def on_train_start(self, trainer, module):
        self.start, self.losses, self.batches = weights(module), [], 0

    def on_train_batch_end(self, trainer, module, *_):
        self.batches += 1
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.model.parameters()])


def pretraining(**settings):
    L.seed_everything(0, verbose=False)
    defaults = dict(optimizer=partial(torch.optim.SGD, lr=1.0), lr_scheduler=partial(WarmupCosine, warmup_steps=0))
    return PretrainModule(tiny_config(vocab_size=VOCABULARY), **{**defaults, **settings})


def train(module, data, **options):
    steps = Steps()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    settings = dict(accelerator="cpu", devices=1, max_steps=1, max_epochs=-1, limit_val_batches=0, precision="64-true")
    trainer = L.Trainer(**{**settings, **quiet, **options, "callbacks": [steps, *options.get("callbacks", [])]})
    given = (
        {"datamodule": data}
        if isinstance(data, L.LightningDataModule)
        else {"train_dataloaders": DataLoader(data, batch_size=None)}
    )
    trainer.fit(module, **given)
    return steps, weights(module) - steps.start


def rows(kind):
    """Return eight rows with different numbers of labels, packed or right-padded; the fourth has no label."""
    generator, places, row = torch.Generator().manual_seed(1), torch.arange(TIME), torch.arange(ROWS)[:, None]
    input_ids = torch.randint(0, VOCABULARY, (ROWS, TIME), generator=generator)
    labels = input_ids.roll(-1, dims=1)
    if kind == "packed":
        documents = (places >= row + 2).long()
        labels[(places == row + 1) | (places % (row + 1) != 0)] = -100
    else:
        documents = torch.where(places <= row, 0, -1)
        labels[documents == -1] = -100
    labels[3] = -100
    return {"input_ids": input_ids, "shift_labels": labels, "document_ids": documents}


def batches(kind, size):
    whole = rows(kind)
    return [{name: values[at : at + size] for name, values in whole.items()} for at in range(0, ROWS, size)]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("kind", "settings", "options"),
    [
        ("packed", {}, {}),
        ("padded", {}, {"gradient_clip_val": 0.01}),
        ("packed", {"matrix_optimizer": partial(torch.optim.Muon, lr=0.1)}, {"gradient_clip_val": 0.01}),
        ("packed", {"activation_checkpointing": True}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    ],
    ids=["packed", "padded, clipped", "two optimisers", "recomputed, clipped by value"],
)
def test_small_batches_make_the_step_of_a_large_one(kind, settings, options, size):
    whole, expected = train(pretraining(**settings), batches(kind, ROWS), **options)
    count = ROWS // size
    parts, moved = train(pretraining(**settings), batches(kind, size), accumulate_grad_batches=count, **options)
    assert (moved - expected).norm() < 1e-6 * expected.norm()
    assert parts.losses == pytest.approx(whole.losses, rel=1e-9)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_in_lower_precision(precision):
    """Gradients in bf16 and float16 agree within rounding and do not overflow."""
    rounding = {"32-true": 1e-6, "bf16-mixed": 2e-2, "16-mixed": 2e-2}[precision]
    plugins = [L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]
    options = {"plugins": plugins, "precision": None} if precision == "16-mixed" else {"precision": precision}
    _, expected = train(pretraining(), batches("packed", ROWS), **options)
    _, moved = train(pretraining(), batches("packed", 2), accumulate_grad_batches=4, **options)
    assert expected.norm() > 0
    assert (moved - expected).norm() < rounding * expected.norm()


def test_batches_without_a_label_change_nothing():
    empty = [{**batch, "shift_labels": torch.full_like(batch["shift_labels"], -100)} for batch in batches("packed", 4)]
    parts, moved = train(pretraining(), empty, accumulate_grad_batches=2)
    assert parts.losses == [0.0]
    assert not moved.any()


def test_the_memory_is_carried_through_a_step(tmp_path):
    """The gradient belongs to the mean over all tokens, with every row read after its predecessor."""
    data = partial(
        TextDataModule,
        path=str(write_text(tmp_path / "text")),
        pattern="*.txt",
        sequence_length=16,
        batch_size=2,
        mode="continuous",
        val_fraction=0.2,
    )
    config = tiny_config(vocab_size=259)
    sgd = partial(torch.optim.SGD, lr=1.0)
    schedule = partial(WarmupCosine, warmup_steps=0)
    make = partial(PretrainModule, config, optimizer=sgd, lr_scheduler=schedule, carry_state=True)
    L.seed_everything(0, verbose=False)
    module = make()
    _, moved = train(module, data(), accumulate_grad_batches=3, precision="32-true")
    L.seed_everything(0, verbose=False)
    other, text = make(), data()
    other.configure_model()
    text.setup("fit")
    total, tokens = torch.zeros(()), 0
    for _, batch in zip(range(3), text.train_dataloader(), strict=False):
        _, nats = other._token_losses(batch, other._cache())
        for layer in other.carried.layers:
            layer.state = detach_state(layer.state)
        total, tokens = total + nats.sum(), tokens + (batch["shift_labels"] != -100).sum()
    (total / tokens).backward()
    expected = -torch.cat([parameter.grad.flatten() for parameter in other.model.parameters()])
    assert (moved - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("num_train", "accumulate", "steps"), [(4, 10, 3), (14, 2, 4), (14, 1, 4)])
def test_accumulation_spans_epochs(num_train, accumulate, steps):
    data = TaskDataModule(Lengths(), batch_size=4, num_train=num_train, num_val=1)
    module = PretrainModule(tiny_config(vocab_size=259), lr_scheduler=partial(WarmupCosine, warmup_steps=0))
    seen, _ = train(module, data, max_steps=steps, accumulate_grad_batches=accumulate)
    assert seen.batches == steps * accumulate
    assert len(seen.losses) == steps


def planned(batches, accumulate=1, scheduling=None, **settings):
    """Return a trainer with this number of batches per epoch."""
    callbacks = [] if scheduling is None else [GradientAccumulationScheduler(scheduling)]
    quiet = dict(logger=False, enable_checkpointing=False, accelerator="cpu", max_epochs=-1)
    trainer = L.Trainer(accumulate_grad_batches=accumulate, callbacks=callbacks, **quiet, **settings)
    trainer.fit_loop.max_batches = batches
    return trainer


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            partial(planned, 7, 3),
            "an epoch of 7 batches ends .* accumulate_grad_batches=3: set trainer.limit_train_batches to 6",
        ),
        (partial(planned, 7, 3, max_steps=3), "or trainer.accumulate_grad_batches to a divisor of 7"),
        (partial(planned, 7, 3, limit_train_batches=7), r"\(trainer.limit_train_batches=7\)"),
        (partial(planned, 2, 3), "accumulate_grad_batches=3: set trainer.accumulate_grad_batches to a divisor of 2"),
        (partial(planned, 7, 3, overfit_batches=7), "set trainer.overfit_batches to 6 or another multiple"),
        (
            partial(planned, 6, scheduling={0: 2, 5: 4}),
            "accumulate_grad_batches=4: set trainer.limit_train_batches to 4",
        ),
    ],
)
def test_epochs_that_would_cut_a_step_are_refused(trainer, message):
    with pytest.raises(ValueError, match=message):
        check_epochs(trainer())


@pytest.mark.parametrize(
    "trainer",
    [
        partial(planned, 6, 3),
        partial(planned, 7),
        partial(planned, 7, 3, max_steps=2),
        partial(planned, 1, 3, fast_dev_run=1),
        partial(planned, float("inf"), 3),
        partial(planned, 8, scheduling={0: 2, 5: 4}),
    ],
)
def test_other_epochs_are_accepted(trainer):
    check_epochs(trainer())


def test_the_command_line_refuses_them_in_one_line(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, trainer__accumulate_grad_batches=4, trainer__limit_train_batches=6)
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", config)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hybridmem: error: an epoch of 6 batches (trainer.limit_train_batches=6) ends within")


# Resumption of a run with 4 steps of 3 batches, dropout and a carried memory.


class Save(L.Callback):
    """Callback that writes checkpoints at the start and end of batches, and at the end of validations and epochs."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, moment):
        if not trainer.sanity_checking:
            done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
            trainer.save_checkpoint(self.folder / f"{moment}{done}.ckpt")

    def on_train_batch_start(self, trainer, *_):
        self.save(trainer, "start")

    def on_train_batch_end(self, trainer, *_):
        self.save(trainer, "end")

    def on_validation_end(self, trainer, *_):
        self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self.save(trainer, "epoch")


class Fail(L.Callback):
    """Callback that raises in the forward or backward pass of a batch."""

    def __init__(self, batch, moment):
        self.batch, self.moment = batch, moment

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed != self.batch:
            return
        layer = module.model.get_submodule("model.layers.0" if self.moment == "backward" else "lm_head")
        if self.moment == "backward":
            layer.feed_forward.down_proj.weight.register_hook(self.fail)
        else:
            layer.register_forward_hook(self.fail)

    def fail(self, *_):
        raise RuntimeError("failed on purpose")


class Numbers(L.Callback):
    """Callback that records the loss of every batch, and the batches after which validation starts."""

    def __init__(self):
        self.losses, self.validated = defaultdict(list), []

    def on_train_batch_end(self, trainer, *_):
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        self.losses[done].append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_start(self, trainer, *_):
        self.validated.append(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def run(folder, callbacks=(), ckpt_path=None, seed=0, **options):
    """Train on a few small files; return the final weights and the recorded numbers."""
    L.seed_everything(seed, verbose=False)
    text = write_text(folder / "text")
    data = TextDataModule(
        str(text), pattern="*.txt", sequence_length=64, batch_size=4, mode="continuous", val_fraction=0.2
    )
    module = PretrainModule(
        tiny_config(vocab_size=259, attention_dropout=0.1),
        carry_state=True,
        lr_scheduler=partial(WarmupCosine, warmup_steps=1),
    )
    numbers = Numbers()
    defaults = dict(
        max_steps=4, max_epochs=-1, accumulate_grad_batches=3, val_check_interval=4, check_val_every_n_epoch=None
    )
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        limit_val_batches=1,
        callbacks=[RandomState(), numbers, *callbacks],
        **{**defaults, **quiet, **options},
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return weights(module), numbers


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of an uninterrupted run with all its checkpoints, its weights and its losses."""
    folder = tmp_path_factory.mktemp("whole")
    end, numbers = run(folder, [Save(folder)], enable_checkpointing=False)
    return folder, end, numbers


@pytest.mark.parametrize("name", ["start0", "start4", "end5", "end6", "end8", "validation4", "validation8", "epoch10"])
def test_a_run_resumes_exactly_from_every_checkpoint(whole, name):
    folder, end, numbers = whole
    path = folder / f"{name}.ckpt"
    if name.startswith("epoch"):
        path = max(folder.glob("epoch*.ckpt"), key=lambda path: int(path.stem[5:]))
    done = int(re.sub(r"\D", "", path.stem))
    assert bool(torch.load(path, weights_only=True)["accumulation"]) == bool(done % 3)
    again, others = run(folder, ckpt_path=path, seed=1, enable_checkpointing=False)
    assert torch.equal(again, end)
    assert others.losses == {batch: loss for batch, loss in numbers.losses.items() if batch > done}


@pytest.mark.parametrize("moment", ["forward", "backward"])
@pytest.mark.parametrize("batch", [6, 7])
def test_exceptions(whole, tmp_path, moment, batch):
    """A failed batch is repeated; within a step, gradients corrupted by its backward pass are rejected."""
    saver = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True, every_n_train_steps=100)
    with pytest.raises(RuntimeError, match="failed on purpose"):
        run(tmp_path, [saver, Fail(batch, moment)])
    if moment == "backward" and batch % 3:
        with pytest.raises(
            ValueError, match="error interrupted the backward pass of batch 2 of accumulate_grad_batches=3"
        ):
            run(tmp_path, ckpt_path=tmp_path / "failed.ckpt", enable_checkpointing=False)
        return
    again, _ = run(tmp_path, ckpt_path=tmp_path / "failed.ckpt", seed=1, enable_checkpointing=False)
    assert torch.equal(again, whole[1])


def test_time_intervals_and_metrics_write_such_checkpoints(whole, tmp_path):
    """A resumed run writes such a checkpoint immediately; monitored metrics exist only after a validation."""
    options = dict(dirpath=tmp_path, save_top_k=-1, filename="{step}")
    timed = ModelCheckpoint(train_time_interval=timedelta(0), **options)
    run(tmp_path, [timed], ckpt_path=whole[0] / "validation4.ckpt")
    saved = min(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert torch.load(saved, weights_only=True)["accumulation"]["batches"] == 2
    again, _ = run(tmp_path, ckpt_path=saved, seed=1, enable_checkpointing=False)
    assert torch.equal(again, whole[1])


def test_another_accumulation_is_refused_within_a_step(whole, tmp_path):
    refused = r"accumulate_grad_batches=2, but the checkpoint was written after 1 of 3 batches; set it to 3, or"
    with pytest.raises(ValueError, match=refused):
        run(whole[0], ckpt_path=whole[0] / "validation4.ckpt", accumulate_grad_batches=2, enable_checkpointing=False)
    _, numbers = run(whole[0], ckpt_path=whole[0] / "end6.ckpt", accumulate_grad_batches=2, enable_checkpointing=False)
    assert list(numbers.losses) == [7, 8, 9, 10]  # two steps of two batches, after two steps of three


def test_a_schedule_of_accumulations_resumes_within_its_epoch(tmp_path):
    """Lightning reads the schedule only at the start of an epoch; epochs end with a step for any accumulation."""
    options = dict(accumulate_grad_batches=1, max_steps=-1, max_epochs=2, enable_checkpointing=False)
    end, numbers = run(tmp_path, [GradientAccumulationScheduler({0: 2, 1: 3}), Save(tmp_path)], **options)
    total = len(numbers.losses)
    assert total % 12 == 0
    saved = tmp_path / f"end{total - 1}.ckpt"
    assert torch.load(saved, weights_only=True)["accumulation"]["batches"] == 2
    again, _ = run(tmp_path, [GradientAccumulationScheduler({0: 2, 1: 3})], ckpt_path=saved, seed=1, **options)
    assert torch.equal(again, end)


def test_weights_alone_hold_no_gradients(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val/bits_per_byte", save_weights_only=True, filename="saved")
    run(tmp_path, [saver], max_steps=2)
    assert "accumulation" not in torch.load(tmp_path / "saved.ckpt", weights_only=True)


def test_a_step_is_dropped_where_the_epoch_begins_anew(recwarn):
    model, step = torch.nn.Linear(2, 1), Accumulation()
    step.sums, step.next_place, step.backwards = torch.ones(3), 2, 2
    model(torch.ones(1, 2)).sum().backward()
    trainer = planned(6, 3)
    step.check_place(model, trainer, batch_idx=5)
    assert step.sums is not None
    step.check_place(model, trainer, batch_idx=0)
    assert step.sums is None
    assert model.weight.grad is None
    assert "2 of accumulate_grad_batches=3 batches" in str(recwarn.pop(UserWarning).message)


# Several processes


def unequal(folder, processes=1, strategy="auto", accumulate=1, batch_size=8, **changes):
    """Write a configuration of a run on answers of unequal lengths."""
    folder.mkdir()
    data = {"class_path": "hybridmem.data.TaskDataModule"}
    data["init_args"] = {"task": f"{__name__}.Lengths", "num_train": 40, "num_val": 4, "batch_size": batch_size}
    monitored = {"filename": "val{step}", "monitor": "val/bits_per_byte", "save_top_k": -1}
    stepped = {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 1}
    for saving in (monitored, stepped):
        saving["auto_insert_metric_name"] = saving is stepped
    keepers = [
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": s} for s in (monitored, stepped)
    ]
    quick = {"max_steps": 4, "enable_progress_bar": False, "val_check_interval": 3}
    share = {"devices": processes, "strategy": strategy, "accumulate_grad_batches": accumulate, "callbacks": keepers}
    settings = {f"trainer__{name}": value for name, value in {**quick, **share, **changes}.items()}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5, "momentum": 0.9}}  # Adam would amplify rounding
    return write_config(folder, data=data, model__init_args__optimizer=sgd, **settings)


@pytest.mark.parametrize(
    ("strategy", "precision", "rounding"), [("ddp", "64-true", 1e-6), (SHARDED, "32-true", 1e-5)], ids=["DDP", "FSDP2"]
)
def test_processes_with_unequal_tokens(tmp_path, monkeypatch, strategy, precision, rounding):
    """Two accumulating ranks take the steps of a single rank; a checkpoint within a step resumes on two or one."""
    one, two, again, alone = (tmp_path / name for name in ("one", "two", "again", "alone"))
    accumulating = partial(unequal, accumulate=2, precision=precision)
    hybridmem(monkeypatch, "fit", "--config", unequal(one, precision=precision))
    fit_several(2, "--config", accumulating(two, 2, strategy, batch_size=2))
    assert logged(two, "train/loss") == pytest.approx(logged(one, "train/loss"), rel=1e-6)
    written = two / "run" / "val1.ckpt"  # after the third batch, which is the first of the second step
    fit_several(2, "--config", accumulating(again, 2, strategy, batch_size=2), "--ckpt_path", written)
    if strategy is SHARDED:
        consolidate(written, tmp_path / "whole.ckpt")
        written = tmp_path / "whole.ckpt"
    hybridmem(monkeypatch, "fit", "--config", accumulating(alone, batch_size=4), "--ckpt_path", written)
    first, same, *close = (
        load_checkpoint(run / "run" / "step=4.ckpt")["state_dict"] for run in (two, again, one, alone)
    )
    for name, value in first.items():
        assert torch.equal(same[name], value), name
        for other in close:
            torch.testing.assert_close(other[name], value, atol=rounding, rtol=0, msg=name)
