"""Accuracy split by a column of the examples, such as the distance to the answer."""

from collections import defaultdict
from typing import Any

import lightning as L

from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.policy.validation import Answered


class AccuracyBy(L.Callback):
    """Callback that logs `val/accuracy_at/COLUMN=VALUE` and `val/pass@1_at/COLUMN=VALUE`, and `test/…` in tests.

    Args:
        column: column of the task's examples, with few distinct values, such as `distance` for Recall and Identifier,
            `question` for VisualSearch or `subtask` for Ruler.

    Raises:
        ValueError: the module is not a PolicyModule, or the examples lack the column or answers.
    """

    def __init__(self, column: str):
        self.column = column
        self._right: dict[tuple[str, Any], list[bool]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the task's examples have the column and answers."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"AccuracyBy supports PolicyModule, not {type(pl_module).__name__}; remove it")
        example = trainer.datamodule.task.example("val", 0)
        missing = [name for name in (self.column, "answer") if name not in example]
        if missing:
            raise ValueError(
                f"AccuracyBy with column={self.column!r} needs {' and '.join(missing)}, but the task's examples only "
                f"have {', '.join(example)}; choose another column or task"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear the results of the last validation."""
        self._right = defaultdict(list)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        """Collect correctness by the column's values."""
        answered: Answered = outputs
        sampled_right = answered.by_example(answered.sampled_right)
        for example, greedy, sampled in zip(answered.examples, answered.greedy_right, sampled_right, strict=True):
            value = example[self.column]
            self._right["accuracy", value].append(greedy)
            self._right["pass@1", value] += sampled

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log accuracy and pass@1 for each value."""
        stage = "test" if trainer.testing else "val"
        for (name, value), right in self._right.items():
            pl_module.log(f"{stage}/{name}_at/{self.column}={value}", sum(right) / len(right), sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
