"""Collective operations that make several ranks train like a single process.

Data is distributed row by row: row i of rank r is row i · size + r of the batch that a single process would have. With
a single process, nothing here communicates.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn

T = TypeVar("T")
_whole: WeakSet[nn.Module] = WeakSet()  # models that are temporarily unsharded

# Messages of gloo, NCCL and the store when a peer has died or timed out.
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "Broken pipe")


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_gather_object(value: T) -> list[T]:
    """Gather the values of all ranks; values are pickled, so tensors should be on the CPU."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def any_rank(condition: bool) -> bool:
    """Return True if the condition holds on any rank."""
    return any(all_gather_object(condition))


@contextmanager
def failing_together(kind: type[Exception]) -> Iterator[None]:
    """Raise an exception on all ranks if one rank raises it; otherwise the others would wait for that rank."""
    own: Exception | None = None
    try:
        yield
    except kind as error:
        own = error
    messages = [message for message in all_gather_object(None if own is None else str(own)) if message is not None]
    if messages:
        raise own or kind(messages[0])


def global_mean_weights(*counts: Tensor | int) -> list[Tensor]:
    """Return factors for this rank's means over `counts` such that the mean over ranks equals the global mean."""
    mine = torch.stack([torch.as_tensor(count) for count in counts]).double()
    _, size = rank_and_size()
    if size == 1:
        return list(torch.ones_like(mine))
    total = mine.clone()
    dist.all_reduce(total)
    return list(mine * size / total.clamp(min=1))


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over all ranks, for whole parameters next to a sharded model."""
    _, size = rank_and_size()
    for parameter in parameters:
        if size > 1 and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= size


def dealt(parts: Sequence[Sequence[T]]) -> list[T]:
    """Interleave the ranks' items in the order of a single process, skipping ranks that have run out of items."""
    longest = max(map(len, parts))
    return [part[place] for place in range(longest) for part in parts if place < len(part)]


def gather_groups(x: Shaped[Tensor, "rows *rest"], num_generations: int) -> Shaped[Tensor, "all_rows *rest"]:
    """Gather the rows of all ranks, in groups of `num_generations` and in the order of a single process.

    All ranks must have the same number of rows.
    """
    parts = [list(part.split(num_generations)) for part in all_gather_object(x.cpu())]
    return torch.cat(dealt(parts)).to(x.device)


def own_groups(x: Shaped[Tensor, "all_rows *rest"], num_generations: int) -> Shaped[Tensor, "rows *rest"]:
    """Select this rank's rows, undoing `gather_groups`."""
    rank, size = rank_and_size()
    return torch.cat(x.split(num_generations)[rank::size])


class Meter:
    """Accumulator of named values, which are averaged over all ranks by weight."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[Any, Any]]] = defaultdict(list)  # each with its weight

    def measure(self, name: str, value: Tensor | float, weight: Tensor | float | int = 1) -> None:
        """Add a value to the mean of its name."""
        self._values[name].append((value.detach() if isinstance(value, Tensor) else value, weight))

    def pop_means(self) -> dict[str, float]:
        """Return the means and reset: each value is averaged over ranks by weight, then over all values of a name.

        Names that end in /max are maxima. A rank may lack values that other ranks have.
        """
        plain = {name: [(float(v), float(w)) for v, w in values] for name, values in self._values.items()}
        self._values.clear()
        parts = all_gather_object(plain)
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _mean(name, dealt_columns([part.get(name, []) for part in parts])) for name in names}


def dealt_columns(lists: Sequence[Sequence[T]]) -> list[list[T]]:
    """Transpose lists of different lengths: the first items of all lists, then the second items, and so on."""
    return [[items[n] for items in lists if n < len(items)] for n in range(max(map(len, lists)))]


def _mean(name: str, columns: list[list[tuple[float, float]]]) -> float:
    if name.endswith("/max"):
        return max(value for column in columns for value, _ in column)
    each = []
    for column in columns:
        total = sum(weight for _, weight in column)
        # A value with weight 0 is a mean over nothing, and may be NaN.
        each.append(sum(value * weight for value, weight in column if weight) / total if total else 0.0)
    return sum(each) / len(each)


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard a transformers model over the ranks of a device mesh, layer by layer (FSDP2).

    Raises:
        ValueError: the mesh has tensor parallelism.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"tensor_parallel_size={mesh['tensor_parallel'].size()} is not supported by the models: set it to 1 and "
            "data_parallel_size to the number of processes"
        )
    from torch.distributed.fsdp import fully_shard

    modules: list[Any] = list(model.modules())
    names = next((m._no_split_modules for m in modules if getattr(m, "_no_split_modules", None)), ())
    for layer in [module for module in modules if type(module).__name__ in names]:
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gather the whole weights on every rank inside the context, so that each rank can run the model independently."""
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not parts or model in _whole:
        yield
        return
    _whole.add(model)
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        _whole.remove(model)
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def lost_a_process(error: BaseException) -> bool:
    """Return True if an error means that another rank has died or timed out."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in LOST)
    )
