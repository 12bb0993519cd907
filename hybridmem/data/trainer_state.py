"""Queries that data modules make to their trainer."""

import math
from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler


def batches_trained(trainer: L.Trainer | None) -> int:
    """Return Lightning's count of training batches since the first start, including resumed runs."""
    return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.total.processed


def batches_used(data: L.LightningDataModule) -> int:
    """Return the number of a data module's batches used in training; in a MixedDataModule, each part's own."""
    count: Callable[[], int] | None = getattr(data, "count_batches", None)
    return batches_trained(data.trainer) if count is None else count()


def share_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return this process's rank, and the number of ranks that share the data."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def is_training(trainer: L.Trainer | None) -> bool:
    """Return True if a checkpoint is loaded for training rather than for validation or testing."""
    return trainer is None or trainer.state.fn == "fit"


def accumulations(trainer: L.Trainer) -> set[int]:
    """Return all values that accumulate_grad_batches takes in a run."""
    schedulers = [callback for callback in trainer.callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return {trainer.accumulate_grad_batches, *(size for each in schedulers for size in each.scheduling.values())}


def batches_of_steps(trainer: L.Trainer | None) -> int:
    """Return the smallest number of batches that gives full optimiser steps for every accumulation in the run."""
    return 1 if trainer is None else math.lcm(*accumulations(trainer))
