"""What both data modules ask of their settings and of their trainer."""

from collections.abc import Sequence

import lightning as L


def at_least(least: int, **settings: int | None) -> None:
    """Refuse settings below `least`; None is no setting."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")


def one_of(choices: Sequence[str], **settings: str) -> None:
    """Refuse settings that are none of the choices."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def batches_trained(trainer: L.Trainer | None) -> int:
    """Batches that training has used since its first start, through all resumes: Lightning's own count."""
    return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.total.processed


def share_of(trainer: L.Trainer | None) -> tuple[int, int]:
    """This process's number, and how many share the data."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def is_training(trainer: L.Trainer | None) -> bool:
    """Whether a checkpoint is loaded to go on training, not to validate or test."""
    return trainer is None or trainer.state.fn == "fit"
