"""Allocations during training: maps of open units or tokens, and accuracy against the share of closed units."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from hybridmem.rl.attention.allocations import AllocationPolicy
from hybridmem.rl.attention.routing import Inputs, SettledRouting
from hybridmem.rl.objectives.gates import Gates
from hybridmem.rl.rollouts.prompts import PromptBatch
from hybridmem.rl.rollouts.sampling import evaluating, read
from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.policy.validation import Answered, answer_greedily
from hybridmem.training.trackers import log_figure

from .policy_probe import is_due, probing, token_label

LINE = 100  # characters of a drawn text


class AllocationMaps(L.Callback):
    """Callback that draws the probability of every unit to read beyond its window, by layer and head.

    Writes allocation_maps/step_M.png in trainer.default_root_dir, and a figure to TensorBoard, Weights & Biases and
    MLflow.

    Args:
        every_n_steps: number of optimiser steps between two maps.

    Raises:
        ValueError: every_n_steps is below 1, or the module's objectives learn no allocation of heads or layers.
    """

    def __init__(self, every_n_steps: int = 50):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps, self.previous_step = every_n_steps, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is an allocation to draw."""
        if not isinstance(pl_module, PolicyModule) or not _gates(pl_module):
            raise ValueError(
                "AllocationMaps draws heads or layers, and no objective learns an allocation of them: add AllocationRL "
                "to objectives, or use RoutedTokens with unit=token"
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

    Held-out prompts are answered greedily with the likeliest units open and the others closed, so that one run yields
    the whole curve. Every prompt is read once for each share, except for the share of validation itself.
    Without an allocation, as for the start of a grid, `hybridmem validate` logs nothing.

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
        if any(isinstance(each, Gates) and each.unit == "token" for each in pl_module.objectives.values()):
            raise ValueError("AllocationCurve opens units in an order, and unit=token has none: use RoutedTokens")
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


class RoutedTokens(L.Callback):
    """Callback that logs `val/beyond`, the share of held-out prompts' tokens that read beyond the window.

    The share is a mean over the layers that have a router. Each validation also draws the first prompt, with the share
    of layers in which each token reads beyond the window, in routed_tokens/step_M.png of trainer.default_root_dir.

    Raises:
        ValueError: no objective has unit=token.
    """

    def __init__(self) -> None:
        self._beyond, self._count = 0.0, 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there is a router to observe."""
        if not isinstance(pl_module, PolicyModule) or not any(
            isinstance(each, Gates) and each.unit == "token" for each in pl_module.objectives.values()
        ):
            raise ValueError("RoutedTokens draws the decisions of tokens: set unit of AllocationRL to token")

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear the counts of the last validation."""
        self._beyond, self._count = 0.0, 0

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: PolicyModule, outputs: Any, batch: Any, batch_idx: int, *_: object
    ) -> None:
        """Count the tokens of the batch's prompts, and draw the first prompt."""
        policy, rule = pl_module.policy, _router(pl_module)
        assert rule is not None
        prompts = policy.prompt_batch([policy.data.prompt(example) for example in batch])
        with probing(trainer):
            beyond = read_by_rule(policy.model, prompts, rule)
        mask = prompts.attention_mask
        mask = torch.ones_like(beyond[:, 0]) if mask is None else mask
        self._beyond += float((beyond & mask[:, None]).sum())
        self._count += int(mask.sum()) * beyond.shape[1]
        if not batch_idx and trainer.is_global_zero:
            ids, shares = prompts.input_ids[0, mask[0]], beyond[0][:, mask[0]].float().mean(0)
            labels = [token_label(policy.tokenizer.decode([token])) for token in ids.tolist()]
            folder = Path(trainer.default_root_dir) / "routed_tokens"
            folder.mkdir(parents=True, exist_ok=True)
            draw_text(labels, shares).savefig(folder / f"step_{trainer.global_step}.png")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the share."""
        stage = "test" if trainer.testing else "val"
        pl_module.log(f"{stage}/beyond", self._beyond / self._count, sync_dist=True)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end


@torch.no_grad()
def read_by_rule(model: Any, prompts: PromptBatch, rule: SettledRouting) -> Bool[Tensor, "rows layers time"]:
    """Read prompts under a router's rule, and return the layers in which each token reads beyond the window."""
    decided: dict[int, Tensor] = {}

    def decide(place: int, x: Inputs) -> Float[Tensor, "rows time"]:
        decided[place] = rule.decide(place, x)
        return decided[place]

    with evaluating(model), rule.units.routed(model, decide):
        read(model, prompts, None)
    return torch.stack([decided[place] for place in sorted(decided)], dim=1) > 0


def _router(module: PolicyModule) -> SettledRouting | None:
    """Return the rule by which held-out tokens read beyond the window, or None without a router."""
    objective = _objective(module)
    rule = objective.settle(module.policy) if objective is not None and objective.unit == "token" else None
    return rule if isinstance(rule, SettledRouting) else None


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


def draw_text(labels: Sequence[str], shares: Float[Tensor, " tokens"]) -> Figure:
    """Draw a text with each token shaded by its share of layers that read beyond the window."""
    places, row, column = [], 0, 0
    for label in labels:
        if column and column + len(label) > LINE:
            row, column = row + 1, 0
        places.append((row, column))
        column += len(label)
    figure = Figure(figsize=(1 + 0.07 * LINE, 0.8 + 0.18 * (row + 1)), layout="constrained", dpi=120)
    axes = figure.subplots()
    colors = colormaps["Oranges"]
    for label, share, (line, start) in zip(labels, shares.tolist(), places, strict=True):
        axes.add_patch(Rectangle((start, line), len(label), 1, facecolor=colors(0.8 * share), edgecolor="white"))
        axes.text(start, line + 0.75, label, family="monospace", fontsize=8, parse_math=False)
    axes.set(xlim=(0, LINE), ylim=(row + 1, 0), xticks=[], yticks=[])
    axes.set_title(f"{100 * float(shares.mean()):.0f} % of tokens and layers read beyond the window")
    return figure
