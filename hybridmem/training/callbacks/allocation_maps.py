"""Maps of the units that an allocation opens, by layer and head."""

from pathlib import Path

import lightning as L
from jaxtyping import Float
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch import Tensor

from hybridmem.rl.attention.allocations import AllocationPolicy
from hybridmem.training.policy.module import PolicyModule

from .policy_probe import is_due


class AllocationMaps(L.Callback):
    """Callback that draws the probability of every unit to read beyond its window, by layer and head.

    Writes allocation_maps/step_M.png in trainer.default_root_dir, and a figure to TensorBoard loggers.

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
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_figure("allocation_maps", figure, step)


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
