"""What the data modules ask of their trainer."""

import math
from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def batches_trained(trainer: L.Trainer | None) -> int:
    """Return how many batches training has used since its first start, through all resumes: Lightning's own count."""
    return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.total.processed


def batches_used(data: L.LightningDataModule) -> int:
    """Return how many of a data module's batches training has used: a part's share of them in a MixedDataModule."""
    count: Callable[[], int] | None = getattr(data, "count_batches", None)
    return batches_trained(data.trainer) if count is None else count()


def share_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """This process's number, and how many share the data."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def is_training(trainer: L.Trainer | None) -> bool:
    """Whether a checkpoint is loaded to go on training, not to validate or test."""
    return trainer is None or trainer.state.fn == "fit"


def accumulations(trainer: L.Trainer) -> set[int]:
    """Return all values that accumulate_grad_batches takes in a run."""
    schedulers = [callback for callback in trainer.callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return {trainer.accumulate_grad_batches, *(size for each in schedulers for size in each.scheduling.values())}


def batches_of_steps(trainer: L.Trainer | None) -> int:
    """Return the number of batches that is a whole number of optimiser steps, whatever the epoch accumulates."""
    return 1 if trainer is None else math.lcm(*accumulations(trainer))
