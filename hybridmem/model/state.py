"""Operations on states: nested tuples of tensors, whose first axis is the batch, and of names."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from torch import Tensor

State = TypeVar("State")  # a tensor, None, a name, or a (named) tuple of states


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply `function` to every tensor of a state, or jointly to the tensors of several states with one structure."""
    if state is None or isinstance(state, str):
        return state
    if isinstance(state, Tensor):
        mapped: Any = function(state, *others)
        return mapped
    assert isinstance(state, tuple)
    parts: Any = [map_state(function, *part) for part in zip(state, *others, strict=True)]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def select_rows(rows: Bool[Tensor, " batch"], yes: State, no: State) -> State:
    """Select `yes` in the chosen rows, and `no` elsewhere."""
    return map_state(lambda a, b: torch.where(rows.view(-1, *(1,) * (a.dim() - 1)), a, b), yes, no)


def detach_state(state: State) -> State:
    """Detach a state from its graph, for truncated backpropagation."""
    return map_state(lambda tensor: tensor.detach(), state)
