"""Learning-rate schedules over a known number of optimiser steps."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

SchedulerFactory = Callable[[Optimizer, int], LRScheduler]  # takes an optimiser and the run's number of steps
ANY_RUN = 10**9  # optimiser steps, longer than any warm-up


class WarmupCosine(LambdaLR):
    """Linear warm-up, then cosine decay to a fraction of the peak learning rate.

    Args:
        optimizer: optimiser whose learning rate is the peak.
        total_steps: optimiser steps of the whole run, filled in by the trainer.
        warmup_steps: optimiser steps of the warm-up.
        final_ratio: final learning rate as a fraction of the peak.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 50, final_ratio: float = 0.1):
        check_steps(total_steps, warmup_steps)

        def ratio(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
            return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, ratio)


class WarmupStableDecay(LambdaLR):
    """Linear warm-up, a plateau that can be extended, then linear decay (WSD, arXiv 2404.06395).

    Args:
        optimizer: optimiser whose learning rate is the plateau.
        total_steps: optimiser steps of the whole run, filled in by the trainer.
        warmup_steps: optimiser steps of the warm-up.
        decay_share: fraction of all steps spent in the decay.
        final_ratio: final learning rate as a fraction of the plateau.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_steps: int = 50,
        decay_share: float = 0.2,
        final_ratio: float = 0.0,
    ):
        check_steps(total_steps, warmup_steps)
        decay_steps = max(1, round(total_steps * decay_share))

        def ratio(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            left = max(0, total_steps - step) / decay_steps
            return final_ratio + (1 - final_ratio) * min(1.0, left)

        super().__init__(optimizer, ratio)


def check_steps(total_steps: int, warmup_steps: int) -> None:
    """Raise a ValueError if the warm-up would take the whole run."""
    if warmup_steps >= total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} must be less than the run's {total_steps} optimiser steps; "
            "lower model.init_args.lr_scheduler.init_args.warmup_steps or raise trainer.max_steps, max_epochs or "
            "limit_train_batches, which limit the run"
        )


def scheduled_steps(trainer: L.Trainer, steps: int | float) -> int:
    """Return the number of optimiser steps to schedule; a fast_dev_run takes the first steps of a very long run."""
    return ANY_RUN if trainer.fast_dev_run else int(steps)


def check_schedule(lr_scheduler: Callable[[Optimizer, int], Any], trainer: L.Trainer) -> None:
    """Raise the schedule's error if it cannot run for the trainer's max_steps."""
    steps = scheduled_steps(trainer, trainer.max_steps)
    lr_scheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), steps)
