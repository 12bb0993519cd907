"""`hybridmem subnetwork A B [C]`: comparison of weights before and after training, for models of any size."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import isnan, nan
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor

from hybridmem.metrics.subnetwork import (
    ALL,
    SWEEP,
    TOLERANCE,
    Overlap,
    UpdateSparsity,
    all_of,
    check_tolerances,
    count_shared,
    count_within,
    float_names,
    kind_of,
    layer_of,
    overlap_of,
    rank_share,
    sparsity_of,
    updated,
)
from hybridmem.metrics.weights import StoredWeights, write_masks

FILE_WIDTH = 120  # width of tables in files and pipes


def subnetwork(
    before: Path,
    after: Path,
    other: Path | None = None,
    tolerance: float = TOLERANCE,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    rank: bool = False,
    output: Path | None = None,
    save_mask: Path | None = None,
) -> None:
    """Count the weights that training updated, by tensor, layer and kind of tensor.

    Args:
        before: model before training, as a Hugging Face folder with safetensors or a safetensors file. The three models
            can be positional arguments: hybridmem subnetwork A B C.
        after: model after training.
        other: model after another training from the same start, to measure the overlap of the two updates.
        tolerance: a weight counts as updated if it changed by more than this.
        dtype: dtype to which weights are cast before the comparison.
        rank: also compute the rank of each matrix's update, which takes minutes per matrix of a large model.
        output: JSON file to write with all results, including each tensor's.
        save_mask: safetensors file to write with a mask of the updated weights, for SubnetworkMask.
    """
    check_tolerances(tolerance)
    models = [StoredWeights(path) for path in (before, after, other) if path is not None]
    names = float_names(*models)
    for path in (output, save_mask):
        if path is not None:  # fails before the long computation if the folder is not writable
            path.parent.mkdir(parents=True, exist_ok=True)
    found = Comparison(models, tolerance, getattr(torch, dtype), rank)
    masks = ((name, found.add(name)) for name in track(names, "comparing", console=Console(stderr=True)))
    if save_mask is None:
        deque(masks, maxlen=0)
    else:
        write_masks(save_mask, {name: models[0].shapes[name] for name in names}, masks)
    if output is not None:
        settings = {"models": [str(model.path) for model in models], "dtype": dtype, "tolerance": tolerance}
        output.write_text(json.dumps(settings | found.results(), indent=1) + "\n")
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    found.show(console, dtype)
    for path in (output, save_mask):
        if path is not None:
            print(f"wrote {path}")


class Comparison:
    """Counts of updated weights between a model and one or two trained versions, accumulated tensor by tensor."""

    def __init__(self, models: Sequence[StoredWeights], tolerance: float, dtype: torch.dtype, rank: bool):
        self.models, self.tolerance, self.dtype, self.rank = models, tolerance, dtype, rank
        self.tolerances = sorted({*SWEEP, tolerance})
        self.within: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self.ranks: dict[str, float] = {}

    def add(self, name: str) -> Bool[Tensor, "..."]:
        """Count a tensor, and return a mask of the entries that the first training updated."""
        before, after, *other = [model[name] for model in self.models]
        self.within[name] = count_within(before, after, self.tolerances, self.dtype)
        if self.rank and before.dim() == 2:
            self.ranks[name] = rank_share(before, after, self.dtype)
        masks = [updated(before, one, self.tolerance, self.dtype) for one in (after, *other)]
        if other:
            self.shared[name] = count_shared(masks)
        return masks[0]

    def sparsity(self, tolerance: float) -> UpdateSparsity:
        """Return the sparsity at one of the tolerances."""
        return sparsity_of(self.within, self.tolerances.index(tolerance))

    def results(self) -> dict[str, Any]:
        """Return all results as plain values, with None in place of NaN."""
        results: dict[str, Any] = {
            "sparsity": asdict(self.sparsity(self.tolerance)),
            "sparsity_at": {str(tolerance): self.sparsity(tolerance).total for tolerance in self.tolerances},
        }
        if self.rank:
            results["rank"] = self.ranks
        if self.shared:
            results["overlap"] = asdict(overlap_of(self.shared))
        return _without_nan(results)

    def show(self, console: Console, dtype: str) -> None:
        """Print the totals and a table by layer and kind of tensor."""
        sweep = ", ".join(f"{self.sparsity(t).total:.2%} within {t:g}" for t in self.tolerances)
        console.print(f"not updated, compared in {dtype}: {sweep}")
        sparsity = self.sparsity(self.tolerance)
        overlap = overlap_of(self.shared) if self.shared else None
        columns = [f"within {self.tolerance:g}"]
        columns += ["rank"] if self.rank else []
        columns += ["shared of A→B", "by chance", "shared of A→C", "by chance"] if overlap else []
        right = [Column(column, justify="right") for column in columns]
        table = Table(Column(overflow="fold"), *right, box=SIMPLE_HEAD)
        for key, shares, overlaps in (
            (layer_of, sparsity.by_layer, overlap and overlap.by_layer),
            (kind_of, sparsity.by_kind, overlap and overlap.by_kind),
            (all_of, {ALL: sparsity.total}, overlap and {ALL: overlap.total}),
        ):
            for name in sorted(shares, key=_natural):
                cells = [name, f"{shares[name]:.2%}"]
                cells += [_percent(self._mean_rank(key, name))] if self.rank else []
                cells += _overlap_cells(overlaps[name]) if overlaps else []
                table.add_row(*cells)
            table.add_section()
        console.print(table)
        if overlap is not None:
            chance = " and ".join(map(_percent, overlap.total.chance_by_tensor))
            console.print(f"overlap by chance with the same number of updates in every tensor: {chance}")

    def _mean_rank(self, key: Callable[[str], str], group: str) -> float:
        ranks = [rank for name, rank in self.ranks.items() if key(name) == group]
        return sum(ranks) / len(ranks) if ranks else nan


def _overlap_cells(overlap: Overlap) -> list[str]:
    pairs = zip(overlap.shares, overlap.chance, strict=True)
    return [_percent(value) for pair in pairs for value in pair]


def _percent(share: float) -> str:
    return "-" if isnan(share) else f"{share:.1%}"


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _without_nan(value: Any) -> Any:
    """Replace NaN by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and isnan(value) else value
