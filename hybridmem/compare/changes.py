"""Record of the weights that a run changed, so that a grid's folder is complete without checkpoints."""

import json
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from hybridmem.metrics.subnetwork import update_masks, update_sparsity
from hybridmem.metrics.weights import shapes_of, write_masks
from hybridmem.training.checkpoints.loading import load_checkpoint

from .grid import MASK

CHANGES = "changes.json"
MODULE = "model."


def write_changes(start: Path, folder: Path) -> None:
    """Write a mask of the weights that a run changed, and its sparsity by tensor, layer and kind and in total."""
    before, after = _weights(start), _weights(folder)
    masks = dict(update_masks(before, after))
    write_masks(folder / MASK, shapes_of(masks), masks.items())
    (folder / CHANGES).write_text(json.dumps(asdict(update_sparsity(before, after)), indent=1) + "\n")


def _weights(folder: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights under the model's own names, without the module's prefix."""
    weights = load_checkpoint(folder / "last.ckpt")["state_dict"]
    return {name.removeprefix(MODULE): tensor for name, tensor in weights.items() if name.startswith(MODULE)}
