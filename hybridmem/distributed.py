"""What the processes of a run do together, so that they train as one would: shares of means, rows in one order.

Data is dealt out row by row: row i of process r is row i · size + r of the batch that one process would have. With one
process nothing here communicates.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn

T = TypeVar("T")
_whole: WeakSet[nn.Module] = WeakSet()  # models that are unsharded for a while

# What gloo, NCCL and the store say when a process at the other end is gone or too late.
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "Broken pipe")


def rank_and_size() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_gather_object(value: T) -> list[T]:
    """Every process's value; it travels pickled, tensors best on the CPU."""
    _, size = rank_and_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def any_rank(condition: bool) -> bool:
    """Whether it holds in any process."""
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
    """What to multiply this process's means over `counts` with, so that the mean over processes is that of all."""
    mine = torch.stack([torch.as_tensor(count) for count in counts]).double()
    _, size = rank_and_size()
    if size == 1:
        return list(torch.ones_like(mine))
    total = mine.clone()
    dist.all_reduce(total)
    return list(mine * size / total.clamp(min=1))


def dealt(parts: Sequence[Sequence[T]]) -> list[T]:
    """The processes' items in the order of one process; one that has fewer is passed over."""
    longest = max(map(len, parts))
    return [part[place] for place in range(longest) for part in parts if place < len(part)]


def gather_groups(x: Shaped[Tensor, "rows *rest"], num_generations: int) -> Shaped[Tensor, "all_rows *rest"]:
    """The rows of all processes, groups of `num_generations` in the order of one process; as many on each."""
    parts = [list(part.split(num_generations)) for part in all_gather_object(x.cpu())]
    return torch.cat(dealt(parts)).to(x.device)


def own_groups(x: Shaped[Tensor, "all_rows *rest"], num_generations: int) -> Shaped[Tensor, "rows *rest"]:
    """Undo `gather_groups`."""
    rank, size = rank_and_size()
    return torch.cat(x.split(num_generations)[rank::size])


class Meter:
    """Collects values by name, and averages them over all ranks by weight."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[Any, Any]]] = defaultdict(list)  # each with its weight

    def measure(self, name: str, value: Tensor | float, weight: Tensor | float | int = 1) -> None:
        """Add a value to the mean of its name."""
        self._values[name].append((value.detach() if isinstance(value, Tensor) else value, weight))

    def pop_means(self) -> dict[str, float]:
        """Return the means and start afresh: each value over all ranks by its weight, then over the values of a name.

        Names that end in /max are maxima. A rank may lack values that others have.
        """
        plain = {name: [(float(v), float(w)) for v, w in values] for name, values in self._values.items()}
        self._values.clear()
        parts = all_gather_object(plain)
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: _mean(name, dealt_columns([part.get(name, []) for part in parts])) for name in names}


def dealt_columns(lists: Sequence[Sequence[T]]) -> list[list[T]]:
    """The first items of all lists, then the second ones, and so on."""
    return [[items[n] for items in lists if n < len(items)] for n in range(max(map(len, lists)))]


def _mean(name: str, columns: list[list[tuple[float, float]]]) -> float:
    if name.endswith("/max"):
        return max(value for column in columns for value, _ in column)
    each = []
    for column in columns:
        total = sum(weight for _, weight in column)
        # A value of no weight was made from nothing, and may be no number.
        each.append(sum(value * weight for value, weight in column if weight) / total if total else 0.0)
    return sum(each) / len(each)


def shard(model: nn.Module, mesh: Any) -> None:
    """Shard a model of transformers over the processes of a device mesh, layer by layer (FSDP2).

    Raises:
        ValueError: the mesh has tensor parallelism.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            f"tensor_parallel_size={mesh['tensor_parallel'].size()} is not supported, the models have no plan for it: "
            "set it to 1 and data_parallel_size to the number of processes"
        )
    from torch.distributed.fsdp import fully_shard

    modules: list[Any] = list(model.modules())
    names = next((m._no_split_modules for m in modules if getattr(m, "_no_split_modules", None)), ())
    for layer in [module for module in modules if type(module).__name__ in names]:
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Whole weights on every process for a while, which then runs the model as often as it likes without the others."""
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
    """Whether an error says that another process of the run is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in LOST)
    )
