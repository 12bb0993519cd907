"""Progress bar of a run: optimiser steps, time and metrics in one line of the terminal."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

EVALUATIONS = {"validate": "validating", "test": "testing", "predict": "predicting"}


class StepBar(ProgressBar):
    """Progress bar over the optimiser steps of a run, or the batches of an evaluation.

    Metrics that do not fit into the line are cut. Without a terminal, nothing is drawn.

    Args:
        console: console to draw on. None: standard error.
    """

    def __init__(self, console: Console | None = None):
        super().__init__()
        self.console = Console(stderr=True) if console is None else console
        self.progress: Progress | None = None
        self.bar = TaskID(0)
        self.enabled = True

    def disable(self) -> None:
        """Draw nothing, as on all ranks but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Draw again."""
        self.enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar at the current step."""
        steps = trainer.estimated_stepping_batches
        self._begin("training", steps if steps < float("inf") else None, trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Advance to the current step."""
        self._show(trainer, completed=trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the finished bar."""
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the bar, so that the error gets its own lines."""
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Describe the training bar as validating, or begin a bar if there is no training."""
        if self.progress is not None:
            self.progress.update(self.bar, description="validating")
        elif trainer.state.fn == "validate":
            self._begin_evaluation(trainer, trainer.num_val_batches)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Return to training, or end."""
        if trainer.state.fn == "fit":
            self._show(trainer, description="training")
        else:
            self._end()

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Count a batch, except during training."""
        if trainer.state.fn != "fit":
            self._show(trainer, advance=1)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar."""
        self._begin_evaluation(trainer, trainer.num_test_batches)

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Count a batch."""
        self._show(trainer, advance=1)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the finished bar."""
        self._end()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the bar."""
        self._begin_evaluation(trainer, trainer.num_predict_batches)

    def on_predict_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Count a batch."""
        self._show(trainer, advance=1)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the finished bar."""
        self._end()

    def print(self, *args: Any, sep: str = " ", **_: Any) -> None:
        """Print above the bar."""
        self.console.print(sep.join(map(str, args)), markup=False, highlight=False)

    def _begin_evaluation(self, trainer: L.Trainer, batches: list[int | float]) -> None:
        total = sum(batches)
        self._begin(EVALUATIONS[trainer.state.fn], total if total < float("inf") else None, 0)

    def _begin(self, description: str, total: float | None, completed: int) -> None:
        if not self.enabled or not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
            console=self.console,
            expand=True,
        )
        self.bar = self.progress.add_task(description, total=total, completed=completed, metrics="")
        self.progress.start()

    def _show(self, trainer: L.Trainer, **change: Any) -> None:
        """Draw a change of the bar, with the current metrics."""
        if self.progress is not None:
            self.progress.update(self.bar, metrics=one_line_of(trainer.progress_bar_metrics), **change)

    def _end(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def with_bar(callbacks: list[Callback] | Callback | None) -> list[Callback]:
    """Return a trainer's callbacks, with a StepBar unless one of them draws progress."""
    given = callbacks if isinstance(callbacks, list) else [] if callbacks is None else [callbacks]
    return given if any(isinstance(callback, ProgressBar) for callback in given) else [*given, StepBar()]


def one_line_of(metrics: dict[str, float]) -> str:
    """Return names without `train/`, and values with three digits."""
    return "  ".join(f"{name.removeprefix('train/')} {value:.3g}" for name, value in metrics.items())
