"""Which weights training changes: how many, of what rank, and the same ones as another run? (after arXiv 2505.11711)

Weights are mappings from names to tensors: state dicts, or `StoredWeights`, of which one tensor is in memory at a
time. Tensors of integers are left out; a tied tensor counts once for each of its names. An entry is updated where it
differs by more than a tolerance, both sides cast to `dtype` first: in float32 nearly every entry moves, in bfloat16
few do.
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
SWEEP = (1e-8, 1e-7, 1e-6, 1e-5)  # the last one is the paper's
TOLERANCE = SWEEP[-1]
PIECE = 2**18  # entries that are compared at a time: their copies stay in a core's cache, which is seven times faster
NUMBERED = re.compile(r"((?:[^.]*\.)*?\d+)\.(.*)")  # a layer, and what is within it
ALL = "all"


@dataclass(frozen=True)
class UpdateSparsity:
    """The share of entries whose update is within a tolerance; all but tensors are weighted by entries.

    A kind is a tensor's name after its layer's number, such as `mlp.up_proj.weight`.
    """

    by_tensor: dict[str, float]
    by_layer: dict[str, float]
    by_kind: dict[str, float]
    total: float


@dataclass(frozen=True)
class Overlap:
    """How much of each of several subnetworks all of them share, a value for each; nan for one without entries.

    For two: |I₁ ∩ I₂| / |I₁| and |I₁ ∩ I₂| / |I₂|. `chance` is what subnetworks of their sizes would share if drawn
    from all entries alike, the product of the others' densities; `chance_by_tensor` if they had their sizes in every
    tensor: what goes beyond is agreement about entries, and not about tensors alone.
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
    """1 − ‖θ₁ − θ₀‖₀ / n, where an entry is 0 if |θ₁ − θ₀| ≤ tolerance.

    Raises:
        ValueError: names or shapes that differ; no tensor of floats; a tolerance below 0.
    """
    check_tolerances(tolerance)
    names = float_names(before, after)
    return sparsity_of({name: count_within(before[name], after[name], [tolerance], dtype) for name in names})


def update_rank(before: Weights, after: Weights, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """rank(θ₁ − θ₀) / min(rows, columns) of each matrix, by name; other tensors are left out.

    Takes the singular values of every matrix: minutes for one of thousands of rows.

    Raises:
        ValueError: names or shapes that differ; no tensor of floats.
    """
    shapes = shapes_of(before)
    matrices = [name for name in float_names(before, after) if len(shapes[name]) == 2]
    return {name: rank_share(before[name], after[name], dtype) for name in matrices}


def update_masks(
    before: Weights, after: Weights, tolerance: float = TOLERANCE, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Bool[Tensor, "..."]]]:
    """Which entries of every tensor are updated, name by name.

    Raises:
        ValueError: names or shapes that differ; no tensor of floats; a tolerance below 0.
    """
    check_tolerances(tolerance)
    names = float_names(before, after)
    return ((name, updated(before[name], after[name], tolerance, dtype)) for name in names)


def subnetwork_overlap(*masks: Weights) -> SubnetworkOverlap:
    """What two or more subnetworks share, beside what chance would give (see `Overlap`).

    Args:
        masks: of each subnetwork, bool tensors by name; state dicts or `StoredWeights`.

    Raises:
        ValueError: fewer than two subnetworks; names or shapes that differ; tensors that are no masks.
    """
    if len(masks) < 2:
        raise ValueError(f"an overlap takes two subnetworks or more, not {len(masks)}")
    check_alike(*masks)
    return overlap_of({name: count_shared([mask[name] for mask in masks]) for name in masks[0]})


def float_names(*weights: Weights) -> list[str]:
    """Names of the tensors of floats in weights of one model, without reading stored ones.

    Raises:
        ValueError: names or shapes that differ; no tensor of floats.
    """
    check_alike(*weights)
    names = [name for name in weights[0] if all(is_float(each, name) for each in weights)]
    if not names:
        raise ValueError("no tensor of the weights is one of floats: masks, or a model of integers?")
    return names


def check_alike(*weights: Weights) -> None:
    """Raise a ValueError that names tensors which are not in all weights, or of other shapes."""
    first, *others = map(shapes_of, weights)
    for number, other in enumerate(others, start=1):
        one, two = _label(weights, 0), _label(weights, number)
        if first.keys() != other.keys():
            only_first, only_other = (listed(sorted(a.keys() - b.keys())) for a, b in ((first, other), (other, first)))
            raise ValueError(
                f"the weights are not of one model: only {one} has {only_first or 'none'}; only {two} has "
                f"{only_other or 'none'}"
            )
        for name, shape in first.items():
            if other[name] != shape:
                raise ValueError(
                    f"the weights are not of one model: {name} is {list(shape)} in {one} and {list(other[name])} in "
                    f"{two}"
                )


def check_tolerances(*tolerances: float) -> None:
    """Raise a ValueError for a tolerance that is none."""
    for tolerance in tolerances:
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance} must be at least 0")


def count_within(
    before: Float[Tensor, "*shape"], after: Float[Tensor, "*shape"], tolerances: Sequence[float], dtype: torch.dtype
) -> Int64[Tensor, " counts"]:
    """How many entries' updates are within each tolerance, and last how many entries there are."""
    counts = torch.zeros(len(tolerances) + 1, dtype=torch.int64)
    for size in _sizes(before, after, dtype):
        counts += torch.tensor([*((size <= tolerance).sum() for tolerance in tolerances), size.numel()])
    return counts


def updated(
    before: Float[Tensor, "*shape"], after: Float[Tensor, "*shape"], tolerance: float, dtype: torch.dtype
) -> Bool[Tensor, "*shape"]:
    """Which entries' updates are not within a tolerance."""
    mask = torch.empty(before.numel(), dtype=torch.bool, device=before.device)
    for part, size in zip(mask.split(PIECE), _sizes(before, after, dtype), strict=True):
        part.copy_(~(size <= tolerance))
    return mask.view(before.shape)


def rank_share(before: Float[Tensor, "m n"], after: Float[Tensor, "m n"], dtype: torch.dtype) -> float:
    """The numerical rank of an update, as torch.linalg.matrix_rank finds it, of the full one."""
    update = _cast(after, dtype) - _cast(before, dtype)
    return int(torch.linalg.matrix_rank(update)) / min(update.shape)


def count_shared(masks: Sequence[Tensor]) -> Float64[Tensor, " counts"]:
    """Entries that all masks of a tensor have, those that chance would give, each mask's own, and all there are.

    Raises:
        ValueError: tensors that are no masks.
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
    """The sparsity at one of the tolerances that `count_within` counted for every tensor."""

    def shares(key: Callable[[str], str]) -> dict[str, float]:
        return {name: (count[place].double() / count[-1]).item() for name, count in summed(counts, key).items()}

    return UpdateSparsity(shares(str), shares(layer_of), shares(kind_of), shares(all_of)[ALL])


def overlap_of(counts: Mapping[str, Float64[Tensor, " counts"]]) -> SubnetworkOverlap:
    """The overlap of the subnetworks that `count_shared` counted for every tensor."""

    def overlaps(key: Callable[[str], str]) -> dict[str, Overlap]:
        return {name: _overlap(count) for name, count in summed(counts, key).items()}

    return SubnetworkOverlap(overlaps(str), overlaps(layer_of), overlaps(kind_of), overlaps(all_of)[ALL])


def summed(counts: Mapping[str, Tensor], key: Callable[[str], str]) -> dict[str, Tensor]:
    """Counts of tensors added up by what their names have in common, in the order of first appearance."""
    sums: dict[str, Tensor] = {}
    for name, count in counts.items():
        sums[key(name)] = sums.get(key(name), torch.zeros_like(count)) + count
    return sums


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: its name up to the first number, or its module where there is none."""
    found = NUMBERED.match(name)
    return found[1] if found else name.rpartition(".")[0]


def kind_of(name: str) -> str:
    """What a tensor is in its layer: its name after the first number, or all of it where there is none."""
    found = NUMBERED.match(name)
    return found[2] if found else name


def all_of(name: str) -> str:
    """The same for every tensor."""
    return ALL


def _overlap(counts: Float64[Tensor, " counts"]) -> Overlap:
    shared, by_chance, *sizes, entries = counts.tolist()

    def of_each(size_of_shared: float) -> list[float]:
        return [size_of_shared / size if size else nan for size in sizes]

    among_all = entries * prod(size / max(entries, 1) for size in sizes)
    return Overlap(of_each(shared), of_each(among_all), of_each(by_chance))


def _sizes(before: Tensor, after: Tensor, dtype: torch.dtype) -> Iterator[Float[Tensor, " entries"]]:
    """|θ₁ − θ₀| of all entries, some at a time."""
    for old, new in zip(before.flatten().split(PIECE), after.flatten().split(PIECE), strict=True):
        yield (_cast(new, dtype) - _cast(old, dtype)).abs()


def _cast(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of a dtype, in one that holds their differences."""
    return weights.to(dtype).to(torch.promote_types(dtype, torch.float32))


def _label(weights: Sequence[Weights], number: int) -> str:
    one = weights[number]
    return str(one.path) if isinstance(one, StoredWeights) else f"weights number {number + 1}"
