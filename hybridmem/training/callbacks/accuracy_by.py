"""Accuracy by a column of the examples, such as how far back the answer lies."""

from collections import defaultdict
from typing import Any

import lightning as L

from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.policy.validation import Answered


class AccuracyBy(L.Callback):
    """Logs, at every validation, `val/accuracy_at/COLUMN=VALUE` and `val/pass@1_at/COLUMN=VALUE`; in tests, `test/…`.

    Args:
        column: of the task's examples, with few values: Recall has `distance`, Identifier `distance`, VisualSearch
            `question`, Ruler `subtask`.

    Raises:
        ValueError: a module that is no PolicyModule; examples without the column, or without answers.
    """

    def __init__(self, column: str):
        self.column = column
        self._right: dict[tuple[str, Any], list[bool]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look whether the task has what is asked for."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"AccuracyBy looks at PolicyModule, not {type(pl_module).__name__}: remove it")
        example = trainer.datamodule.task.example("val", 0)
        missing = [name for name in (self.column, "answer") if name not in example]
        if missing:
            raise ValueError(
                f"AccuracyBy's column={self.column!r}: the task's examples have {', '.join(example)}, and not "
                f"{' nor '.join(missing)}"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last validation."""
        self._right = defaultdict(list)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        """Sort what was answered."""
        answered: Answered = outputs
        sampled_right = answered.by_example(answered.sampled_right)
        for example, greedy, sampled in zip(answered.examples, answered.greedy_right, sampled_right, strict=True):
            value = example[self.column]
            self._right["accuracy", value].append(greedy)
            self._right["pass@1", value] += sampled

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the shares."""
        stage = "test" if trainer.testing else "val"
        for (name, value), right in self._right.items():
            pl_module.log(f"{stage}/{name}_at/{self.column}={value}", sum(right) / len(right), sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
