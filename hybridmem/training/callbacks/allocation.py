"""Allocations during training: maps of open units, and held-out accuracy against the share of closed ones."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from hybridmem.rl.attention.allocations import AllocationPolicy
from hybridmem.rl.objectives.allocation import Gates
from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.policy.validation import Answered, answer_greedily
from hybridmem.training.trackers import log_figure

from .policy_probe import is_due, probing


class AllocationMaps(L.Callback):
    """Callback that draws the probability of every unit to read beyond its window, by layer and head.

    Writes allocation_maps/step_M.png in trainer.default_root_dir, and a figure to TensorBoard, Weights & Biases and
    MLflow.

    Args:
        every_n_steps: optimiser steps between two maps.

    Raises:
        ValueError: every_n_steps is below 1, or the module's objectives learn no allocation.
    """

    def __init__(self, every_n_steps: int = 50):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps, self.previous_step = every_n_steps, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is an allocation to draw."""
        if not isinstance(pl_module, PolicyModule) or not _gates(pl_module):
            raise ValueError(
                "AllocationMaps draws an allocation, and no objective learns one: add AllocationRL to objectives"
            )
        self.previous_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: PolicyModule, *_: object) -> None:
        """Draw every `every_n_steps` optimiser steps."""
        step, previous = trainer.global_step, self.previous_step
        self.previous_step = step
        if not is_due(step, previous, self.every_n_steps) or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "allocation_maps"
        folder.mkdir(parents=True, exist_ok=True)
        for gates in _gates(pl_module):
            figure = draw_allocation(gates.probabilities.detach())
            figure.savefig(folder / f"step_{step}.png")
            log_figure(trainer.loggers, "allocation_maps", figure, step)


class AllocationCurve(L.Callback):
    """Callback that logs `val/accuracy_at/closed=SHARE` for shares of closed units, and `test/…` in tests.

    Held-out prompts are answered greedily with the likeliest units open and the others closed, so that one training
    gives the whole curve. Every prompt is read once for each share, except for the share of validation itself.
    `hybridmem validate` of a run without an allocation, such as the start of a grid, logs nothing.

    Args:
        closed: shares of closed units, from 0 (every unit reads everything) to 1.

    Raises:
        ValueError: a share is out of range or given twice, or no objective of a training run holds an allocation, or
            the task has no answers or acts in environments.
    """

    def __init__(self, closed: Sequence[float] = (0.0, 0.5, 0.8, 0.9, 0.95, 1.0)):
        if not closed or len(set(closed)) < len(closed) or not all(0 <= share <= 1 for share in closed):
            raise ValueError(f"closed={list(closed)} must hold one or more different shares from 0 to 1")
        self.closed = closed
        self._right: dict[float, list[bool]] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there is an allocation to measure, and a task that can judge answers."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"AllocationCurve supports PolicyModule, not {type(pl_module).__name__}; remove it")
        if stage == "fit" and _objective(pl_module) is None:
            raise ValueError("AllocationCurve measures an allocation, which no objective holds: add AllocationRL")
        task = trainer.datamodule.task
        acts = pl_module.environment_factory or getattr(task, "environment", None)
        if acts or "answer" not in task.example("val", 0):
            raise ValueError(
                f"AllocationCurve judges single answers, which the task {type(task).__name__} does not have; remove it"
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear the results of the last validation."""
        self._right = defaultdict(list)

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        """Answer the batch's prompts once for each share."""
        objective, answered = _objective(pl_module), outputs
        assert isinstance(answered, Answered)
        if objective is None:
            return
        settled = objective.fixed(pl_module.policy).opened
        for share in self.closed:
            action = objective.likeliest(pl_module.policy, 1 - share)
            if torch.equal(action.opened, settled):
                self._right[share] += answered.greedy_right
                continue
            with probing(trainer):
                texts = answer_greedily(pl_module.worker, answered.examples, [action])
            judged = Answered(answered.examples, texts, []).judged(pl_module.data.task)
            self._right[share] += judged.greedy_right

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the accuracy at each share."""
        stage = "test" if trainer.testing else "val"
        for share, right in self._right.items():
            pl_module.log(f"{stage}/accuracy_at/closed={share:g}", sum(right) / len(right), sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


def _objective(module: PolicyModule) -> Gates | None:
    """Return the objective that holds an allocation, or None."""
    return next((each for each in module.objectives.values() if isinstance(each, Gates)), None)


def _gates(module: PolicyModule) -> list[AllocationPolicy]:
    return [part for part in module.learned.values() if isinstance(part, AllocationPolicy)]


def draw_allocation(probabilities: Float[Tensor, "layers heads"]) -> Figure:
    """Draw the probability of every unit to be open, or its share over several runs; layers run from left to right."""
    layers, heads = probabilities.shape
    figure = Figure(figsize=(1.6 + 0.24 * layers, 1.3 + 0.3 * heads), layout="constrained", dpi=120)
    axes = figure.subplots()
    image = axes.imshow(probabilities.T.float().cpu(), vmin=0, vmax=1, cmap="magma", aspect="auto")
    axes.set(xlabel="layer", ylabel="KV head", yticks=range(heads), xticks=range(0, layers, max(1, layers // 15)))
    figure.colorbar(image, ax=axes, label="reads everything")
    return figure
