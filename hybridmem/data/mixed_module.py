"""Mixture of data modules; each training batch comes from one of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import numpy as np

from hybridmem.checks import at_least

from .trainer_state import batches_used

Batch = dict[str, Any]


class MixedDataModule(L.LightningDataModule):
    """Training batches of several data modules in given proportions; the first part provides the validation data.

    The part of a batch depends on `seed` and the batch's number only, equally on all ranks, and every part counts its
    own batches. A resumed run therefore continues with exactly the next batch. The mixture is endless: set the
    trainer's `max_steps`, or `limit_train_batches` for the length of an epoch.

    `setup` sets `tokenizer`, `vocab_size` and `token_byte_lengths`, which all parts share.

    Args:
        parts: data modules with the same tokenizer.
        shares: relative weights of the parts; None gives equal weights.
        seed: seeds the order of the parts.

    Raises:
        ValueError: A setting is invalid; raised by the constructor or by `setup`.
    """

    def __init__(self, parts: list[L.LightningDataModule], shares: list[int | float] | None = None, seed: int = 0):
        super().__init__()
        at_least(0, seed=seed)
        if not parts:
            raise ValueError("parts is empty; set at least one data module")
        shares = [1] * len(parts) if shares is None else shares
        if len(shares) != len(parts) or min(shares) < 0 or not sum(shares) > 0:
            raise ValueError(
                f"shares={shares} must be one non-negative number per part, {len(parts)} in all, with a positive sum"
            )
        self.parts = parts
        self.save_hyperparameters(ignore=["parts"], logger=False)
        self.hparams["tokenizer"] = parts[0].hparams.get("tokenizer")
        self.chances = np.array(shares) / sum(shares)
        self.fetched: list[int] | None = None  # batches per part, set while a loader starts
        for number, part in enumerate(parts):
            part.count_batches = partial(self.batches_of, number)

    def setup(self, stage: str | None = None) -> None:
        """Set up all parts."""
        for part in self.parts:
            part.trainer = self.trainer
            part.setup(stage)
        first = self.parts[0]
        for number, part in enumerate(self.parts):
            if part.tokenizer.get_vocab() != first.tokenizer.get_vocab():
                raise ValueError(
                    f"parts[{number}] has tokenizer={part.hparams.get('tokenizer')!r}, but parts[0] has "
                    f"{first.hparams.get('tokenizer')!r}; set the same tokenizer for all parts"
                )
        self.tokenizer, self.vocab_size = first.tokenizer, first.vocab_size
        self.token_byte_lengths = first.token_byte_lengths

    def turns(self, batches: int) -> Iterator[int]:
        """Yield the part index of every training batch from batch number `batches` on."""
        rng = np.random.default_rng((self.hparams.seed,))
        rng.random(batches)  # one draw per batch
        while True:
            yield int(self.part_of(rng.random(1))[0])

    def counts(self, batches: int) -> list[int]:
        """Return the number of batches of each part among the first `batches` training batches."""
        drawn = self.part_of(np.random.default_rng((self.hparams.seed,)).random(batches))
        return np.bincount(drawn, minlength=len(self.parts)).tolist()

    def part_of(self, draws: np.ndarray) -> np.ndarray:
        """Map uniform numbers in [0, 1) to parts according to their shares."""
        return np.searchsorted(self.chances.cumsum()[:-1], draws, side="right")

    def batches_of(self, number: int) -> int:
        """Return the number of a part's batches that training has used, or has fetched while a loader starts."""
        counts = self.counts(batches_used(self)) if self.fetched is None else self.fetched
        return counts[number]

    def train_dataloader(self) -> "MixedLoader":
        """Return the endless sequence of training batches from the run's current position on."""
        self.check_length()
        return MixedLoader(self, [part.train_dataloader() for part in self.parts])

    def check_length(self) -> None:
        """Raise a ValueError if the first epoch would never end."""
        trainer = self.trainer
        if trainer is None or trainer.max_epochs == -1 or trainer.max_steps != -1:
            return
        if isinstance(trainer.limit_train_batches, float):
            raise ValueError(
                "a mixture is endless: set the trainer's max_steps, or limit_train_batches to the number of batches in "
                "an epoch"
            )

    @contextmanager
    def starting(self, fetched: list[int]) -> Iterator[None]:
        """Make the parts count fetched batches instead of trained ones inside the context."""
        self.fetched = fetched
        try:
            yield
        finally:
            self.fetched = None

    def val_dataloader(self) -> Any:
        """Return the first part's validation rows."""
        return self.parts[0].val_dataloader()

    def test_dataloader(self) -> Any:
        """Return the first part's validation rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the first part's validation rows."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states and the settings of the mixture."""
        return {"parts": [part.state_dict() for part in self.parts], "mixture": self.mixture()}

    def mixture(self) -> dict[str, Any]:
        """Return the settings that fix the order of the parts."""
        return {"chances": self.chances.tolist(), "seed": self.hparams.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the checkpoint's position."""
        if state["mixture"] != self.mixture():
            raise ValueError(
                f"the checkpoint has the mixture {state['mixture']}, but this run has {self.mixture()}; resume with "
                "the checkpoint's shares and seed"
            )
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


class MixedLoader:
    """Loader that interleaves the batches of several loaders."""

    def __init__(self, data: MixedDataModule, loaders: list[Any]):
        self.data, self.loaders = data, loaders

    def __iter__(self) -> Iterator[Batch]:
        trained = batches_used(self.data)
        fetched = self.data.counts(trained)
        running: list[Iterator[Batch] | None] = [None] * len(self.loaders)
        for number in self.data.turns(trained):
            batch = self._next(running, number, fetched)
            fetched[number] += 1
            yield batch

    def _next(self, running: list[Iterator[Batch] | None], number: int, fetched: list[int]) -> Batch:
        """Return a part's next batch, starting its next epoch if necessary."""
        with self.data.starting(fetched):
            for _ in range(2):
                iterator = running[number]
                if iterator is None:
                    iterator = running[number] = iter(self.loaders[number])
                batch = next(iterator, None)
                if batch is not None:
                    return batch
                running[number] = None
        raise ValueError(f"parts[{number}] has no full training batch; add data, or lower its batch_size")

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state, which silences Lightning's warning; the data module's state has the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing; the data module's state has the position."""
