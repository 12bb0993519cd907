"""Which weights each cell changed, and how much of that the seeds share."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..metrics import subnetwork_overlap, update_masks, update_sparsity
from ..training.checkpoints import load_checkpoint
from .results import Results, interval

Weights = dict[str, Tensor]


def add_changes(results: Results, root: Path) -> None:
    """Add `sparsity`, and `overlap` where there are several seeds, to every row of the summaries.

    `overlap` has the mean share of each seed's subnetwork that all seeds change, and what chance would give.
    """
    for task in results["tasks"].values():
        starts = {(run["architecture"], run["seed"]): run["folder"] for run in task["warm_ups"]}
        for row in task["summary"]:
            cells = [cell for cell in task["cells"] if _is_of(cell, row)]
            pairs = [(starts[cell["architecture"], cell["seed"]], cell["folder"]) for cell in cells]
            weights = [(_weights(root / before), _weights(root / after)) for before, after in pairs]
            if weights:
                row["sparsity"] = interval([update_sparsity(*pair).total for pair in weights])
            if len(weights) > 1:
                overlap = subnetwork_overlap(*(dict(update_masks(*pair)) for pair in weights)).total
                count = len(weights)
                row["overlap"] = {"shares": sum(overlap.shares) / count, "chance": sum(overlap.chance) / count}


def _is_of(cell: dict[str, Any], row: dict[str, Any]) -> bool:
    same = (cell["architecture"], cell["label"]) == (row["architecture"], row["label"])
    return same and cell["status"] == "finished" and "compute" in cell  # an evaluation changes nothing


def _weights(folder: Path) -> Weights:
    return load_checkpoint(folder / "last.ckpt")["state_dict"]
