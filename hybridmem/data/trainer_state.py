"""What the data modules ask of their trainer."""

from collections.abc import Callable

import lightning as L


def batches_trained(data: L.LightningDataModule) -> int:
    """Return how many of its batches training has used since its first start, through all resumes.

    That is Lightning's own count, or a part's share of it in a MixedDataModule.
    """
    count: Callable[[], int] | None = getattr(data, "count_batches", None)
    if count is not None:
        return count()
    trainer = data.trainer
    return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.total.processed


def share_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """This process's number, and how many share the data."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def is_training(trainer: L.Trainer | None) -> bool:
    """Whether a checkpoint is loaded to go on training, not to validate or test."""
    return trainer is None or trainer.state.fn == "fit"
