"""Attention maps of a policy's answers, drawn during training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hybridmem.rl.attention.distributions import distribution
from hybridmem.rl.attention.recorder import LayerRecord
from hybridmem.rl.attention.targets import KINDS
from hybridmem.rl.rollouts.sampling import Sampling
from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.policy.validation import SOLVED
from hybridmem.training.trackers import log_figure

from .policy_probe import Answers, is_due, probing, record_answers, token_label

LABELLED = 128  # maximum number of tokens on an axis with labels
TRIED = 16  # held-out examples to try until one is solved
Map = Float[Tensor, "queries keys"]
Shares = Float[Tensor, "queries 3"]  # in the order of hybridmem.rl.attention.targets.KINDS


class AttentionMaps(L.Callback):
    """Callback that draws the policy's attention to earlier tokens while it answers a held-out prompt.

    The images are attention_maps/layer_N_step_M.png in trainer.default_root_dir, and also go to TensorBoard, Weights &
    Biases and MLflow. The first is drawn before training.

    The policy answers greedily. Rows are the answer's tokens, and columns are all tokens, with image patches by number.
    The top map is the head-averaged attention. Below it are memory-implied attention, if the layer has a memory of
    depth 1, and the allocation over persistent tokens, memory and window.

    In environments, the answer is a whole trajectory including observations. It comes from the first of 16 examples
    that the policy solves, or from the first example if it solves none.

    Args:
        every_n_steps: optimiser steps between two drawings.
        layers: layers to draw, one image each; negative numbers count from the end.
        example: index of the held-out prompt.

    Raises:
        ValueError: a setting is out of range, or, before the first batch, a layer has no attention to draw.
    """

    def __init__(self, every_n_steps: int = 50, layers: Sequence[int] = (-1,), example: int = 0):
        if every_n_steps < 1 or example < 0:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1 and example={example} at least 0")
        self.every_n_steps, self.layers, self.example = every_n_steps, layers, example
        self.previous_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the initial policy of a new run."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"AttentionMaps supports PolicyModule, not {type(pl_module).__name__}; remove it")
        self.previous_step = trainer.global_step
        if trainer.global_step == 0:
            self._log(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: PolicyModule, *_: object) -> None:
        """Draw the maps every `every_n_steps` optimiser steps."""
        step, previous = trainer.global_step, self.previous_step
        self.previous_step = step
        if is_due(step, previous, self.every_n_steps):
            self._log(trainer, pl_module)

    def _log(self, trainer: L.Trainer, module: PolicyModule) -> None:
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "attention_maps"
        folder.mkdir(parents=True, exist_ok=True)
        example, answers = self._answered(module)
        patches = 0 if module.data.processor is not None else len(example.get("images", ()))
        labels = [f"#{n}" for n in range(patches)]
        labels += [token_label(module.data.tokenizer.decode([token])) for token in answers.ids[0, patches:].tolist()]
        for number, record in answers.records.items():
            length = answers.completions.ids.shape[1]
            figure = draw(attention_maps(record, length), labels, shares(record, length))
            if answers.earned is not None:
                figure.suptitle("solved" if answers.earned[0] >= SOLVED else "not solved")
            figure.savefig(folder / f"layer_{number}_step_{trainer.global_step}.png")
            log_figure(trainer.loggers, f"attention_maps/layer_{number}", figure, trainer.global_step)

    def _answered(self, module: PolicyModule) -> tuple[dict[str, Any], Answers]:
        greedy = Sampling(max_completion_length=module.sampling.max_completion_length, temperature=0.0)
        found: list[tuple[dict[str, Any], Answers]] = []
        for number in range(self.example, self.example + TRIED):
            example = module.data.task.example("val", number)
            found.append((example, self._record(module, example, greedy)))
            earned = found[-1][1].earned
            if earned is None or earned[0] >= SOLVED:
                return found[-1]
        return found[0]

    def _record(self, module: PolicyModule, example: dict[str, Any], greedy: Sampling) -> Answers:
        return record_answers(module.worker, example, 1, greedy, self.layers, precision=probing(module.trainer))


def attention_maps(record: LayerRecord, queries: int) -> dict[str, Map]:
    """Return the first row's attention and memory-implied attention of the last `queries` tokens, if available.

    Raises:
        ValueError: the layer has neither.
    """
    maps = {}
    if record.attention is not None or record.segments:
        maps["attention"] = distribution(record, "attention", queries)[0]
    if record.memory is not None and record.memory_depth == 1:
        maps["memory"] = distribution(record, "memory", queries)[0]
    if not maps:
        raise ValueError(
            f"AttentionMaps cannot draw a layer of variant {record.variant} with memory_depth={record.memory_depth}, "
            "which has no distribution over earlier tokens; choose other layers"
        )
    return maps


def shares(record: LayerRecord, queries: int) -> Shares | None:
    """Return the first row's allocation at the last `queries` tokens, or None if the layer allocates nothing."""
    if record.gate is None and not record.segments:
        return None
    return distribution(record, "allocation", queries)[0]


def draw(maps: dict[str, Map], labels: list[str], allocation: Shares | None = None) -> Figure:
    """Draw a heat map for each distribution, one below the other, and the allocation underneath.

    `labels` are for all tokens; the last ones label the queries.
    """
    queries, keys = next(iter(maps.values())).shape
    panels = len(maps) + (allocation is not None)
    size = (min(2.5 + 0.16 * keys, 22), len(maps) * min(1.6 + 0.18 * queries, 10) + 2.2 * (panels - len(maps)))
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    heights = [*(max(queries, 8) for _ in maps), *([8] * (panels - len(maps)))]
    all_axes = figure.subplots(panels, squeeze=False, height_ratios=heights)[:, 0]
    if allocation is not None:
        _draw_shares(all_axes[-1], allocation, labels[keys - queries :])
    for axes, (name, values) in zip(all_axes, maps.items(), strict=False):
        image = axes.imshow(values.float().cpu(), vmin=0, aspect="auto", cmap="magma", interpolation="nearest")
        axes.set(title=name, xlabel="token", ylabel="generated token")
        if keys <= LABELLED:
            axes.set_xticks(range(keys), labels, family="monospace", parse_math=False, rotation=90, fontsize=8)
        if queries <= LABELLED:
            axes.set_yticks(range(queries), labels[keys - queries :], family="monospace", parse_math=False, fontsize=8)
        figure.colorbar(image, ax=axes, label="share")
    return figure


def _draw_shares(axes: Axes, allocation: Shares, labels: list[str]) -> None:
    ways = allocation.float().cpu().T.numpy()
    used = [number for number, share in enumerate(ways) if share.any()]  # mag's gate has no persistent tokens
    names, colors = [KINDS[number] for number in used], [f"C{number}" for number in used]
    axes.stackplot(range(len(labels)), ways[used], labels=names, colors=colors, step="mid")
    axes.set(title="allocation", xlabel="generated token", ylabel="share", xlim=(-0.5, len(labels) - 0.5), ylim=(0, 1))
    if len(labels) <= LABELLED:
        axes.set_xticks(range(len(labels)), labels, family="monospace", parse_math=False, rotation=90, fontsize=8)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
