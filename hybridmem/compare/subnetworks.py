"""Overlap of the weights that a grid's cells changed, over seeds and between controls."""

import json
from pathlib import Path

from hybridmem.metrics.subnetwork import subnetwork_overlap
from hybridmem.metrics.weights import StoredWeights

from .changes import CHANGES
from .grid import MASK
from .results import Results, finished_cells, interval


def add_subnetworks(results: Results, root: Path) -> None:
    """Add sparsity and subnetwork overlaps to every row of the summaries with a warm-up.

    `overlap` is the mean share of each seed's subnetwork that all seeds change. `overlap_with` is the mean share of a
    row's subnetwork that another row's run with the same seed changes. Both include the share expected by chance.
    """
    for task in results["tasks"].values():
        masks: dict[str, dict[str, dict[int, StoredWeights]]] = {}
        for row in task["summary"]:
            cells = {cell["seed"]: root / cell["folder"] for cell in finished_cells(task, row)}
            folders = {seed: folder for seed, folder in cells.items() if (folder / CHANGES).exists()}
            if not folders:
                continue
            changes = [json.loads((folder / CHANGES).read_text()) for folder in folders.values()]
            row["sparsity"] = interval([each["total"] for each in changes])
            row["sparsity_by_kind"] = {
                kind: interval([each["by_kind"][kind] for each in changes]) for kind in changes[0]["by_kind"]
            }
            found = {  # runs without any change have no overlap
                seed: StoredWeights(folder / MASK)
                for (seed, folder), each in zip(folders.items(), changes, strict=True)
                if each["total"] < 1
            }
            if len(found) > 1:
                overlap = subnetwork_overlap(*found.values()).total
                row["overlap"] = _means([overlap.shares], [overlap.chance])
            masks.setdefault(row["architecture"], {})[row["label"]] = found
        for row in task["summary"]:
            if "sparsity" in row:
                row["overlap_with"] = _with_others(row["label"], masks[row["architecture"]])


def _with_others(label: str, masks: dict[str, dict[int, StoredWeights]]) -> dict[str, dict[str, float]]:
    found = {}
    for other, theirs in masks.items():
        seeds = [seed for seed in masks[label] if seed in theirs]
        if other != label and seeds:
            overlaps = [subnetwork_overlap(masks[label][seed], theirs[seed]).total for seed in seeds]
            found[other] = _means([each.shares[:1] for each in overlaps], [each.chance[:1] for each in overlaps])
    return found


def _means(shares: list[list[float]], chance: list[list[float]]) -> dict[str, float]:
    return {name: sum(map(sum, x)) / sum(map(len, x)) for name, x in (("shares", shares), ("chance", chance))}
