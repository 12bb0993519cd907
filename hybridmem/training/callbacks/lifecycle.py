"""Run lifecycle: random state for exact resumption, a clean stop and a final checkpoint."""

import random
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from hybridmem.data.trainer_state import batches_trained
from hybridmem.distributed import all_gather_object, any_rank, rank_and_size


class RandomState(L.Callback):
    """Callback that saves the state of the random generators, so that a resumed run draws the same numbers."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None
        self.started = False
        self.before: tuple[int, dict[str, Any]] = (-1, {})  # number of batches, and the state after them

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the state as tensors, lists and numbers, which load with weights_only.

        If an exception cut a batch short, save the state from before it, because the resumed run repeats the batch.
        """
        batches, before = self.before
        state = before if batches == batches_trained(trainer) else _random_state()
        checkpoint["random_state"] = all_gather_object(state)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state until training starts, because setup draws random numbers too."""
        self.before = (-1, {})
        states, (rank, size) = checkpoint.get("random_state"), rank_and_size()
        self.loaded = states[rank] if states is not None and len(states) == size else None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Restore the state before the first batch; without a saved state, give each rank its own random numbers.

        Until then all ranks share their random numbers, because a sharded model must start alike on every rank.
        """
        started, self.started = self.started, True
        if self.loaded is None:
            if not started and trainer.world_size > 1:
                torch.manual_seed(torch.initial_seed() + trainer.global_rank + trainer.world_size * trainer.global_step)
        else:
            self._restore(self.loaded)
            self.loaded = None
        self.before = batches_trained(trainer), _random_state()

    def _restore(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])


def _random_state() -> dict[str, Any]:
    state: Any = np.random.get_state()  # noqa: NPY002 (libraries still draw from the global generator)
    name, keys, *rest = state
    return {
        "torch": torch.get_rng_state(),
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


class FinalCheckpoint(L.Callback):
    """Callback that updates last.ckpt at the end of training, after ModelCheckpoint's last interval."""

    def __init__(self) -> None:
        self.saved_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the initial state as saved."""
        self.saved_step = trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the step of the newest checkpoint."""
        self.saved_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save a checkpoint if there are steps since the newest one."""
        if self.saved_step == trainer.global_step:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last and callback.last_model_path:
                trainer.save_checkpoint(callback.last_model_path, callback.save_weights_only)


class GracefulStop(L.Callback):
    """Callback that stops a run cleanly on Ctrl-C or SIGTERM. A second Ctrl-C stops at once.

    The run finishes its batch and any validation that is due, saves a checkpoint and prints the command to resume. In
    the middle of a gradient accumulation, the checkpoint holds the gradients so far; a module that does not save them
    (`saves_accumulation`) stops after its optimiser step. If any process receives the signal, all stop after the same
    batch.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers early, for a stop during the sanity check."""
        self._take_over()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Install the signal handlers, and reset the counters of an interrupted batch."""
        self._take_over()
        _forget_batch_under_way(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the previous signal handlers."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
        self._restore()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stop if any process has received a signal."""
        accumulated = batch_idx % trainer.accumulate_grad_batches
        if accumulated and not getattr(pl_module, "saves_accumulation", False):
            return
        if not any_rank(self.received is not None):
            return
        path = Path(trainer.default_root_dir) / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        command = shlex.join([sys.argv[0], *_without_checkpoint(sys.argv[1:]), "--ckpt_path", str(path)])
        within = f" and {accumulated} of {trainer.accumulate_grad_batches} batches" if accumulated else ""
        rank_zero_info(f"\nstopped after step {trainer.global_step}{within}, all saved. Resume with:\n  {command}")
        raise KeyboardInterrupt

    def _take_over(self) -> None:
        if not self.previous:
            self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        rank_zero_info(
            "\nstopping after this batch and any validation due, then saving (press Ctrl-C again to stop at once)"
        )

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def _forget_batch_under_way(trainer: L.Trainer) -> None:
    """Reset the total counters if the checkpoint was written in the middle of a batch.

    Lightning only resets the epoch's counters. With the total counters one ahead, `val_check_interval` would validate
    a batch early or skip the next validation, and loggers would skip a step.
    """
    loop = trainer.fit_loop.epoch_loop
    total = loop.batch_progress.total
    if total.ready == total.processed:
        return
    if loop.restarting and not loop._should_accumulate():
        loop._batches_that_stepped -= 1  # the loop's own reset adds one afterwards
    total.ready = total.started = total.processed


def _without_checkpoint(arguments: list[str]) -> list[str]:
    """Return the command line without --ckpt_path."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--ckpt_path":
            skip = True
        elif not argument.startswith("--ckpt_path="):
            kept.append(argument)
    return kept
