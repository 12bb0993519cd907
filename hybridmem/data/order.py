"""What comes when: orders that follow from a seed and an epoch, and a sampler that can go on from any row."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset, DistributedSampler


def permutation(size: int, *key: int) -> Int[np.ndarray, " size"]:
    """The numbers below `size`, shuffled; the same for the same key, such as (seed, epoch)."""
    return np.random.default_rng(key).permutation(size)


def start_of_data() -> int:
    """The position of a sampler that always begins at the first row."""
    return 0


def whole_steps(num_rows: int, batch_size: int, world_size: int, batches_of_steps: int) -> int | None:
    """Return a rank's rows of an epoch whose batches are a multiple of `batches_of_steps`; None leaves the epoch as is.

    An optimiser step that accumulates several batches thus never meets the end of an epoch.
    """
    if batches_of_steps == 1:
        return None
    batches = -(-num_rows // world_size) // batch_size
    return -(-batches // batches_of_steps) * batches_of_steps * batch_size


class EndlessSampler(DistributedSampler[int]):
    """Rows of a data set, epoch after epoch without end; each iteration goes on from `position()`.

    The sequence follows from `seed` alone. So whoever knows how many rows were used can go on exactly where they
    ended, in the middle of an epoch or between two, whatever was fetched ahead. Row r of epoch e is given as the
    index e · num_rows + r: the data set sees the epoch, also in worker processes.

    It is a DistributedSampler so that Lightning leaves it alone: process `rank` takes every `world_size`-th row of
    the sequence, and one batch over all processes is a run of consecutive rows. `set_epoch` does nothing.

    Args:
        num_rows: rows of one epoch.
        seed: of the order, another one in every epoch; None: rows as they stand.
        position: how many rows of the sequence were used, by all processes together.
        num_samples: rows of an iteration on this rank; None: an epoch's share.
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
        """The rows of an epoch in the order in which they come."""
        if self.order_seed is None:
            return np.arange(self.num_rows)
        return permutation(self.num_rows, self.order_seed, epoch)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the position says which epoch it is."""


class ResumableLoader(DataLoader):
    """A DataLoader whose sampler knows where to go on; having a state tells Lightning that it need not warn."""

    def state_dict(self) -> dict:
        """Empty: the position is in the data module's state."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to do."""


def ordered_loader(
    rows: Dataset, sampler: EndlessSampler, batch_size: int, *, num_workers: int = 0, drop_last: bool = False
) -> ResumableLoader:
    """Batches of the rows that the sampler names."""
    return ResumableLoader(
        rows,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator a loader draws from the global one each time it is iterated. Validation follows
        # the checkpoint at an epoch's end: that draw would be missing after a resume.
        generator=torch.Generator().manual_seed(0),
    )
