"""Subnetworks updated by training: their sparsity, rank, and overlap between runs (after arXiv 2505.11711).

Weights are mappings from names to tensors: state dicts, or `StoredWeights`, which keep one tensor in memory at a time.
Integer tensors are ignored; a tied tensor counts once for each of its names. An entry is updated if it differs by more
than a tolerance after both sides are cast to `dtype`: in float32 nearly every entry changes, in bfloat16 few do.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import nan, prod

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from .weights import StoredWeights, is_float, listed, shapes_of

Weights = Mapping[str, Tensor]
SWEEP = (1e-8, 1e-7, 1e-6, 1e-5)  # the paper uses the last one
TOLERANCE = SWEEP[-1]
PIECE = 2**18  # entries compared at a time; copies that fit into a core's cache are seven times as fast
NUMBERED = re.compile(r"((?:[^.]*\.)*?\d+)\.(.*)")  # a layer, and the name within the layer
ALL = "all"


@dataclass(frozen=True)
class UpdateSparsity:
    """Share of entries whose update is within a tolerance, by tensor, layer and kind of tensor, and overall.

    A kind is a tensor's name after its layer's number, such as `mlp.up_proj.weight`. Shares are weighted by entries.
    """

    by_tensor: dict[str, float]
    by_layer: dict[str, float]
    by_kind: dict[str, float]
    total: float


@dataclass(frozen=True)
class Overlap:
    """Share of each subnetwork that is common to all of them; NaN for subnetworks without entries.

    For two subnetworks, the shares are |I₁ ∩ I₂| / |I₁| and |I₁ ∩ I₂| / |I₂|. `chance` is the expected share of
    uniformly drawn subnetworks of equal sizes, the product of the others' densities. `chance_by_tensor` draws them with
    equal sizes within each tensor: a larger overlap is agreement about entries, not only about tensors.
    """

    shares: list[float]
    chance: list[float]
    chance_by_tensor: list[float]


@dataclass(frozen=True)
class SubnetworkOverlap:
    """`Overlap` within each tensor, each layer, each kind of tensor and over all."""

    by_tensor: dict[str, Overlap]
    by_layer: dict[str, Overlap]
    by_kind: dict[str, Overlap]
    total: Overlap


def update_sparsity(
    before: Weights, after: Weights, tolerance: float = TOLERANCE, dtype: torch.dtype = torch.bfloat16
) -> UpdateSparsity:
    """Compute 1 − ‖θ₁ − θ₀‖₀ / n, where an entry is 0 if |θ₁ − θ₀| ≤ tolerance.

    Raises:
        ValueError: names or shapes differ, there is no floating-point tensor, or the tolerance is below 0.
    """
    check_tolerances(tolerance)
    names = float_names(before, after)
    return sparsity_of({name: count_within(before[name], after[name], [tolerance], dtype) for name in names})


def update_rank(before: Weights, after: Weights, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Compute rank(θ₁ − θ₀) / min(rows, columns) of each matrix by name; other tensors are ignored.

    The singular values of a matrix with thousands of rows take minutes.

    Raises:
        ValueError: names or shapes differ, or there is no floating-point tensor.
    """
    shapes = shapes_of(before)
    matrices = [name for name in float_names(before, after) if len(shapes[name]) == 2]
    return {name: rank_share(before[name], after[name], dtype) for name in matrices}


def update_masks(
    before: Weights, after: Weights, tolerance: float = TOLERANCE, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Bool[Tensor, "..."]]]:
    """Yield a mask of updated entries for every tensor, with its name.

    Raises:
        ValueError: names or shapes differ, there is no floating-point tensor, or the tolerance is below 0.
    """
    check_tolerances(tolerance)
    names = float_names(before, after)
    return ((name, updated(before[name], after[name], tolerance, dtype)) for name in names)


def subnetwork_overlap(*masks: Weights) -> SubnetworkOverlap:
    """Compute the overlap of two or more subnetworks, and the overlap expected by chance (see `Overlap`).

    Args:
        masks: bool tensors by name for each subnetwork; state dicts or `StoredWeights`.

    Raises:
        ValueError: there are fewer than two subnetworks, names or shapes differ, or tensors are not masks.
    """
    if len(masks) < 2:
        raise ValueError(f"an overlap needs at least two subnetworks, not {len(masks)}: give more masks")
    check_alike(*masks)
    return overlap_of({name: count_shared([mask[name] for mask in masks]) for name in masks[0]})


def float_names(*weights: Weights) -> list[str]:
    """List the names of floating-point tensors in weights of one model, without reading stored tensors.

    Raises:
        ValueError: names or shapes differ, or there is no floating-point tensor.
    """
    check_alike(*weights)
    names = [name for name in weights[0] if all(is_float(each, name) for each in weights)]
    if not names:
        raise ValueError("the weights hold no floating-point tensor: give weights, not masks or a quantised model")
    return names


def check_alike(*weights: Weights) -> None:
    """Raise a ValueError that names tensors which are missing from some weights or differ in shape."""
    first, *others = map(shapes_of, weights)
    for number, other in enumerate(others, start=1):
        one, two = _label(weights, 0), _label(weights, number)
        if first.keys() != other.keys():
            only_first, only_other = (listed(sorted(a.keys() - b.keys())) for a, b in ((first, other), (other, first)))
            raise ValueError(
                f"the weights belong to different models: only {one} has {only_first or 'none'}; only {two} has "
                f"{only_other or 'none'}"
            )
        for name, shape in first.items():
            if other[name] != shape:
                raise ValueError(
                    f"the weights belong to different models: {name} is {list(shape)} in {one} and "
                    f"{list(other[name])} in {two}"
                )


def check_tolerances(*tolerances: float) -> None:
    """Raise a ValueError for a negative or NaN tolerance."""
    for tolerance in tolerances:
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance} must be at least 0")


def count_within(
    before: Float[Tensor, "*shape"], after: Float[Tensor, "*shape"], tolerances: Sequence[float], dtype: torch.dtype
) -> Int64[Tensor, " counts"]:
    """Count the entries whose updates are within each tolerance, followed by the number of all entries."""
    counts = torch.zeros(len(tolerances) + 1, dtype=torch.int64)
    for size in _sizes(before, after, dtype):
        counts += torch.tensor([*((size <= tolerance).sum() for tolerance in tolerances), size.numel()])
    return counts


def updated(
    before: Float[Tensor, "*shape"], after: Float[Tensor, "*shape"], tolerance: float, dtype: torch.dtype
) -> Bool[Tensor, "*shape"]:
    """Mark the entries whose updates exceed a tolerance."""
    mask = torch.empty(before.numel(), dtype=torch.bool, device=before.device)
    for part, size in zip(mask.split(PIECE), _sizes(before, after, dtype), strict=True):
        part.copy_(~(size <= tolerance))
    return mask.view(before.shape)


def rank_share(before: Float[Tensor, "m n"], after: Float[Tensor, "m n"], dtype: torch.dtype) -> float:
    """Compute the numerical rank of an update (torch.linalg.matrix_rank) as a share of full rank."""
    update = _cast(after, dtype) - _cast(before, dtype)
    return int(torch.linalg.matrix_rank(update)) / min(update.shape)


def count_shared(masks: Sequence[Tensor]) -> Float64[Tensor, " counts"]:
    """Count a tensor's entries that are common to all masks, expected by chance, in each mask, and in total.

    Raises:
        ValueError: the tensors are not masks.
    """
    if any(mask.dtype != torch.bool for mask in masks):
        raise ValueError(f"masks are bool, not {masks[0].dtype}: make them with update_masks")
    shared = masks[0]
    for mask in masks[1:]:
        shared = shared & mask
    sizes = torch.stack([mask.sum() for mask in masks]).double().cpu()
    entries = masks[0].numel()
    by_chance = entries * (sizes / max(entries, 1)).prod()
    return torch.cat((torch.tensor([shared.sum(), by_chance]), sizes, torch.tensor([entries])))


def sparsity_of(counts: Mapping[str, Int64[Tensor, " counts"]], place: int = 0) -> UpdateSparsity:
    """Compute the sparsity at one of the tolerances from the counts of `count_within` for every tensor."""

    def shares(key: Callable[[str], str]) -> dict[str, float]:
        return {name: (count[place].double() / count[-1]).item() for name, count in summed(counts, key).items()}

    return UpdateSparsity(shares(str), shares(layer_of), shares(kind_of), shares(all_of)[ALL])


def overlap_of(counts: Mapping[str, Float64[Tensor, " counts"]]) -> SubnetworkOverlap:
    """Compute the overlap of subnetworks from the counts of `count_shared` for every tensor."""

    def overlaps(key: Callable[[str], str]) -> dict[str, Overlap]:
        return {name: _overlap(count) for name, count in summed(counts, key).items()}

    return SubnetworkOverlap(overlaps(str), overlaps(layer_of), overlaps(kind_of), overlaps(all_of)[ALL])


def summed(counts: Mapping[str, Tensor], key: Callable[[str], str]) -> dict[str, Tensor]:
    """Sum the counts of tensors by a key of their names, in the order of first appearance."""
    sums: dict[str, Tensor] = {}
    for name, count in counts.items():
        sums[key(name)] = sums.get(key(name), torch.zeros_like(count)) + count
    return sums


def layer_of(name: str) -> str:
    """Return the layer of a tensor: its name up to the first number, or its module if there is no number."""
    found = NUMBERED.match(name)
    return found[1] if found else name.rpartition(".")[0]


def kind_of(name: str) -> str:
    """Return the kind of a tensor: its name after the first number, or the whole name if there is no number."""
    found = NUMBERED.match(name)
    return found[2] if found else name


def all_of(name: str) -> str:
    """Return the key of all tensors together."""
    return ALL


def _overlap(counts: Float64[Tensor, " counts"]) -> Overlap:
    shared, by_chance, *sizes, entries = counts.tolist()

    def of_each(size_of_shared: float) -> list[float]:
        return [size_of_shared / size if size else nan for size in sizes]

    among_all = entries * prod(size / max(entries, 1) for size in sizes)
    return Overlap(of_each(shared), of_each(among_all), of_each(by_chance))


def _sizes(before: Tensor, after: Tensor, dtype: torch.dtype) -> Iterator[Float[Tensor, " entries"]]:
    """Yield |θ₁ − θ₀| of all entries, piece by piece."""
    for old, new in zip(before.flatten().split(PIECE), after.flatten().split(PIECE), strict=True):
        yield (_cast(new, dtype) - _cast(old, dtype)).abs()


def _cast(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Round weights to `dtype`, and return them in a dtype that can represent their differences."""
    return weights.to(dtype).to(torch.promote_types(dtype, torch.float32))


def _label(weights: Sequence[Weights], number: int) -> str:
    one = weights[number]
    return str(one.path) if isinstance(one, StoredWeights) else f"weights number {number + 1}"
