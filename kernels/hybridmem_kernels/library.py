"""Helpers for registering operators with torch.library.

An operator's forward and backward are two functions of tensors. Eager calls use them through a torch.autograd.Function,
which has the lowest overhead. torch.compile would trace through that class, including its loops. Compiled graphs
therefore use two opaque torch.library operators. A library operator cannot save tensors, so the forward returns its
results followed by the tensors for the backward.
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

from torch import Tensor


def triton_module(package: str | None, name: str = "triton_autograd") -> ModuleType:
    """Import a module of an operator that needs Triton, an optional dependency."""
    return import_module(f".{name}", package)


def given(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Return the tensors that are not None."""
    return [tensor for tensor in tensors if tensor is not None]


def own_memory(outputs: Iterable[Tensor | None], inputs: Iterable[Tensor | None]) -> list[Tensor]:
    """Make outputs contiguous, and copy those that share memory, because an operator must not alias its inputs."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in given(inputs)}
    owned = []
    for tensor in given(outputs):
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owned.append(tensor.clone() if storage in taken else tensor)
        taken.add(owned[-1].untyped_storage().data_ptr())
    return owned


def zeros_where_none(grads: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor]:
    """Replace missing gradients by zeros, for operators that must return all of them."""
    return [like.new_zeros(like.shape) if grad is None else grad for grad, like in zip(grads, likes, strict=True)]
