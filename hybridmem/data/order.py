"""Reproducible orders of rows, and a sampler that can resume at any row."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def permutation(size: int, *key: int) -> Int[np.ndarray, " size"]:
    """Return a random permutation of the numbers below `size` that depends on the key only, such as (seed, epoch)."""
    return np.random.default_rng(key).permutation(size)


def start_of_data() -> int:
    """Return 0, the position of a sampler that always starts at the first row."""
    return 0


def whole_steps(num_rows: int, batch_size: int, world_size: int, batches_of_steps: int) -> int | None:
    """Round a rank's rows per epoch up to full optimiser steps of `batches_of_steps` batches, or return None for 1.

    An optimiser step that accumulates several batches then never crosses the end of an epoch.
    """
    if batches_of_steps == 1:
        return None
    batches = -(-num_rows // world_size) // batch_size
    return -(-batches // batches_of_steps) * batches_of_steps * batch_size


class EndlessSampler(DistributedSampler[int]):
    """Sampler of an endless sequence of epochs; each iteration starts at `position()`.

    The sequence depends on `seed` only. The number of used rows is therefore enough to resume exactly, at any point of
    an epoch and regardless of prefetching. Row r of epoch e has the index e · num_rows + r, so that the data set knows
    the epoch, also in worker processes.

    The class derives from DistributedSampler so that Lightning does not replace it. Rank `rank` takes every
    `world_size`-th row of the sequence, so one batch over all ranks is a run of consecutive rows. `set_epoch` does
    nothing.

    Args:
        num_rows: the number of rows in one epoch.
        seed: seeds the order, which differs in every epoch; None keeps the rows in order.
        position: returns the number of rows that all ranks together have used.
        num_samples: the number of rows per iteration on this rank; None takes the rank's share of an epoch.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        seed: int | None,
        position: Callable[[], int] = start_of_data,
        rank: int = 0,
        world_size: int = 1,
        num_samples: int | None = None,
    ):
        super().__init__(range(num_rows), num_replicas=world_size, rank=rank)  # type: ignore[arg-type]
        self.num_samples = num_samples or self.num_samples
        self.num_rows, self.order_seed, self.position = num_rows, seed, position

    def __iter__(self) -> Iterator[int]:
        first = self.position() + self.rank
        order_epoch, order = -1, np.empty(0, dtype=np.int64)
        for place in range(first, first + len(self) * self.num_replicas, self.num_replicas):
            epoch, row = divmod(place, self.num_rows)
            if epoch != order_epoch:
                order_epoch, order = epoch, self.order(epoch)
            yield epoch * self.num_rows + int(order[row])

    def order(self, epoch: int) -> Int[np.ndarray, " rows"]:
        """Return the rows of an epoch in their order."""
        if self.order_seed is None:
            return np.arange(self.num_rows)
        return permutation(self.num_rows, self.order_seed, epoch)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing; the position determines the epoch."""


class ResumableLoader(DataLoader):
    """DataLoader with a resumable sampler, and with state methods that silence Lightning's warning."""

    def state_dict(self) -> dict:
        """Return an empty state; the data module's state has the position."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Do nothing; the data module's state has the position."""


def ordered_loader(
    rows: Dataset, sampler: EndlessSampler, batch_size: int, *, num_workers: int = 0, drop_last: bool = False
) -> ResumableLoader:
    """Return a loader of batches in the sampler's order."""
    return ResumableLoader(
        rows,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator, a loader draws from the global one in each iteration. Validation runs after the
        # checkpoint at an epoch's end, so a resumed run would miss that draw.
        generator=torch.Generator().manual_seed(0),
    )
