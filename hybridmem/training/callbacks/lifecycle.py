"""The life of a run: random state for exact resumption, a clean stop, a checkpoint at the end."""

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
    """Checkpoints the random generators, which Lightning does not: a resumed run draws what it would have drawn."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None
        self.started = False
        self.before: tuple[int, dict[str, Any]] = (-1, {})  # after that many batches

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save as tensors, lists and numbers: checkpoints are loaded with weights_only.

        An exception may have cut a batch, which the resumed run repeats with the numbers that it began with.
        """
        batches, before = self.before
        state = before if batches == batches_trained(trainer) else _random_state()
        checkpoint["random_state"] = all_gather_object(state)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep them until training starts: setting up draws numbers too."""
        self.before = (-1, {})
        states, (rank, size) = checkpoint.get("random_state"), rank_and_size()
        self.loaded = states[rank] if states is not None and len(states) == size else None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Restore before the first batch; where there is nothing to restore, let processes draw different numbers.

        Until here they drew the same ones: models that are sharded have to start alike.
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
    """Lets last.ckpt hold the end of training: ModelCheckpoint alone leaves it where its last interval ended."""

    def __init__(self) -> None:
        self.saved_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What a run begins with needs no saving."""
        self.saved_step = trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how far the newest checkpoint goes."""
        self.saved_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the steps since then."""
        if self.saved_step == trainer.global_step:
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_last and callback.last_model_path:
                trainer.save_checkpoint(callback.last_model_path, callback.save_weights_only)


class GracefulStop(L.Callback):
    """On Ctrl-C or SIGTERM: finish the batch, save a checkpoint, say how to go on. A second Ctrl-C stops at once.

    The checkpoint is taken before the next batch begins, after the validation that is due, if any: a resumed run misses
    neither. In the middle of a gradient accumulation the checkpoint holds the gradients so far; a module that does not
    save them (`saves_accumulation`) is stopped after its optimiser step. Of several processes it is enough that one
    gets the signal: all stop after the same batch.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals: a run that is stopped here has lost nothing either."""
        self._take_over()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals."""
        self._take_over()
        _forget_batch_under_way(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give them back."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give them back."""
        self._restore()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stop here if a signal came, to this process or to another one."""
        accumulated = batch_idx % trainer.accumulate_grad_batches
        if accumulated and not getattr(pl_module, "saves_accumulation", False):
            return
        if not any_rank(self.received is not None):
            return
        path = Path(trainer.default_root_dir) / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        command = shlex.join([sys.argv[0], *_without_checkpoint(sys.argv[1:]), "--ckpt_path", str(path)])
        within = f" and {accumulated} of {trainer.accumulate_grad_batches} batches" if accumulated else ""
        rank_zero_info(f"\nstopped after step {trainer.global_step}{within}; nothing is lost. Go on with:\n  {command}")
        raise KeyboardInterrupt

    def _take_over(self) -> None:
        if not self.previous:
            self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        rank_zero_info("\nstopping after this batch and the validation due, to save it (once more: stop at once)")

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def _forget_batch_under_way(trainer: L.Trainer) -> None:
    """Reset the counters of a batch that had begun, but not ended, when the checkpoint was written.

    Lightning resets those of the epoch alone. With the others one ahead, `val_check_interval` would validate a batch
    early, or miss the validation that is due next, and loggers would skip a step.
    """
    loop = trainer.fit_loop.epoch_loop
    total = loop.batch_progress.total
    if total.ready == total.processed:
        return
    if loop.restarting and not loop._should_accumulate():
        loop._batches_that_stepped -= 1  # the loop's own reset, which follows, adds one
    total.ready = total.started = total.processed


def _without_checkpoint(arguments: list[str]) -> list[str]:
    """The command line without an earlier --ckpt_path."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--ckpt_path":
            skip = True
        elif not argument.startswith("--ckpt_path="):
            kept.append(argument)
    return kept
