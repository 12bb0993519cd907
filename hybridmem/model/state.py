"""Operations on states: nested tuples of tensors, whose first axis is the batch, and of names and numbers.

The keys and values of past tokens are such a tuple too: plain tensors, or a buffer that takes further tokens in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hybridmem_kernels.checks import may_overwrite

State = TypeVar("State")  # a tensor, None, a name, a number, or a (named) tuple of states


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply `function` to every tensor of a state, or jointly to the tensors of several states with one structure."""
    if state is None or isinstance(state, str | int):
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


Keys = Float[Tensor, "batch kv_heads count dim"]


class PlainKeys(NamedTuple):
    """Keys and values as tensors."""

    keys: Keys
    values: Keys


class KeyBuffer(NamedTuple):
    """Keys and values in a buffer with room for more: [free, front, kept, free].

    The front holds persistent tokens, right before the oldest key that is kept, so that both are one block.
    """

    both: Float[Tensor, "batch two kv_heads capacity dim"]
    front: Float[Tensor, "batch two kv_heads front dim"]
    start: int  # of the kept keys
    stop: int

    @property
    def keys(self) -> Keys:
        """Return the kept keys."""
        return self.both[:, 0, :, self.start : self.stop]

    @property
    def values(self) -> Keys:
        """Return the kept values."""
        return self.both[:, 1, :, self.start : self.stop]

    @property
    def seen(self) -> tuple[Keys, Keys]:
        """Return keys and values with the front before them, after `followed_by` has put it there."""
        front = self.front.shape[3]
        keys, values = self.both.narrow(3, self.start - front, self.stop - self.start + front).unbind(1)
        return keys, values

    def followed_by(self, keys: Keys, values: Keys) -> "KeyBuffer":
        """Append keys and values, in place where there is room; a buffer must not be continued in two ways."""
        stop, front = self.stop + keys.shape[2], self.front.shape[3]
        if stop > self.both.shape[3] or self.both.dtype != keys.dtype or not may_overwrite(self.both):
            larger = key_buffer(self.keys.to(keys.dtype), self.values.to(keys.dtype), self.front, keys.shape[2])
            return larger.followed_by(keys, values)
        self.both[:, 0, :, self.stop : stop] = keys
        self.both[:, 1, :, self.stop : stop] = values
        if front and self.start > front:
            self.both[:, :, :, self.start - front : self.start] = self.front
        return self._replace(stop=stop)

    def last(self, count: int) -> "KeyBuffer":
        """Keep the last `count` keys; the older ones give way to the front later."""
        return self._replace(start=max(self.start, self.stop - count))


def key_buffer(
    keys: Keys, values: Keys, front: Float[Tensor, "batch two kv_heads front dim"], more: int = 1
) -> KeyBuffer:
    """Return a buffer of these keys and values, with room for at least `more`."""
    batch, heads, count, dim = keys.shape
    start = front.shape[3]
    stop = start + count
    both = keys.new_empty(batch, 2, heads, stop + max(more, 32, count // 2), dim)
    both[:, :, :, :start] = front
    both[:, 0, :, start:stop] = keys
    both[:, 1, :, start:stop] = values
    return KeyBuffer(both, front, start, stop)
