"""Several data modules as one: each training batch comes from one of them."""

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
    """Training batches of several data modules, drawn by share; validation is the first part's.

    Which part a batch comes from follows from `seed` and the batch's number, on all processes alike, and every part
    counts its own batches. So a resumed run goes on with the very batch that would have been next. The mixture has no
    end: say how long to train with the trainer's `max_steps`, or how long an epoch is with `limit_train_batches`.

    After `setup`: `tokenizer`, `vocab_size` and `token_byte_lengths`, which all parts share.

    Args:
        parts: data modules with the same tokenizer.
        shares: of the training batches, one for each part; None: equal ones. Their sum does not matter.
        seed: of the order in which the parts take turns.

    Raises:
        ValueError: in the constructor or in `setup`, naming the setting to change.
    """

    def __init__(self, parts: list[L.LightningDataModule], shares: list[int | float] | None = None, seed: int = 0):
        super().__init__()
        at_least(0, seed=seed)
        if not parts:
            raise ValueError("parts names no data module: give at least one")
        shares = [1] * len(parts) if shares is None else shares
        if len(shares) != len(parts) or min(shares) < 0 or not sum(shares) > 0:
            raise ValueError(
                f"shares={shares} must be one number for each of the {len(parts)} parts, none below 0 and some above"
            )
        self.parts = parts
        self.save_hyperparameters(ignore=["parts"], logger=False)
        self.hparams["tokenizer"] = parts[0].hparams.get("tokenizer")
        self.chances = np.array(shares) / sum(shares)
        self.fetched: list[int] | None = None  # each part's batches, while a loader starts
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
                    f"parts[{number}] has tokenizer={part.hparams.get('tokenizer')!r} and parts[0] "
                    f"{first.hparams.get('tokenizer')!r}: give all parts the same tokenizer"
                )
        self.tokenizer, self.vocab_size = first.tokenizer, first.vocab_size
        self.token_byte_lengths = first.token_byte_lengths

    def turns(self, batches: int) -> Iterator[int]:
        """Yield the part of every training batch from number `batches` on."""
        rng = np.random.default_rng((self.hparams.seed,))
        rng.random(batches)  # a draw a batch
        while True:
            yield int(self.part_of(rng.random(1))[0])

    def counts(self, batches: int) -> list[int]:
        """Return how many of the first `batches` training batches are each part's."""
        drawn = self.part_of(np.random.default_rng((self.hparams.seed,)).random(batches))
        return np.bincount(drawn, minlength=len(self.parts)).tolist()

    def part_of(self, draws: np.ndarray) -> np.ndarray:
        """Map numbers in [0, 1) to parts, by their shares."""
        return np.searchsorted(self.chances.cumsum()[:-1], draws, side="right")

    def batches_of(self, number: int) -> int:
        """Return how many of a part's batches training has used, or its loader was asked for while one starts."""
        counts = self.counts(batches_used(self)) if self.fetched is None else self.fetched
        return counts[number]

    def train_dataloader(self) -> "MixedLoader":
        """Return the endless sequence of training batches from the run's position on."""
        self.check_length()
        return MixedLoader(self, [part.train_dataloader() for part in self.parts])

    def check_length(self) -> None:
        """Refuse a run that would never come to the end of its first epoch."""
        trainer = self.trainer
        if trainer is None or trainer.max_epochs == -1 or trainer.max_steps != -1:
            return
        if isinstance(trainer.limit_train_batches, float):
            raise ValueError(
                "a mixture has no end: set the trainer's max_steps, or limit_train_batches to the number of batches in "
                "an epoch"
            )

    @contextmanager
    def starting(self, fetched: list[int]) -> Iterator[None]:
        """Let the parts count fetched batches in place of trained ones, inside the context."""
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
        """Return the parts' states and how the mixture is drawn."""
        return {"parts": [part.state_dict() for part in self.parts], "mixture": self.mixture()}

    def mixture(self) -> dict[str, Any]:
        """Return the settings that fix the order of the parts."""
        return {"chances": self.chances.tolist(), "seed": self.hparams.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint's run ended."""
        if state["mixture"] != self.mixture():
            raise ValueError(
                f"the checkpoint's mixture was {state['mixture']}, this run's is {self.mixture()}: resume with the "
                "shares and the seed of the checkpoint"
            )
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)


class MixedLoader:
    """Batches of several loaders in turns."""

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
        """Return a part's next batch, of its next epoch where one has ended."""
        with self.data.starting(fetched):
            for _ in range(2):
                iterator = running[number]
                if iterator is None:
                    iterator = running[number] = iter(self.loaders[number])
                batch = next(iterator, None)
                if batch is not None:
                    return batch
                running[number] = None
        raise ValueError(f"parts[{number}] has no training batch: give it more data, or a smaller batch_size")

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position is in the data module's state. Having one tells Lightning that it need not warn."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
