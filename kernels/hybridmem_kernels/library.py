"""Helpers for registering operators with torch.library.

An operator's forward and backward are two functions of tensors. An eager call reaches them through a
torch.autograd.Function, which costs least. torch.compile would trace through that class, loop by loop. In compiled
graphs they are therefore two operators of torch.library, which stay whole. A library operator cannot save tensors, so
the forward returns its results followed by the tensors that the backward needs.
"""

from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType

from torch import Tensor


def triton_module(package: str | None, name: str = "triton_autograd") -> ModuleType:
    """Import a module of an operator that needs Triton, which is not installed everywhere."""
    return import_module(f".{name}", package)


def given(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Return the tensors that are not None."""
    return [tensor for tensor in tensors if tensor is not None]


def own_memory(outputs: Iterable[Tensor | None], inputs: Iterable[Tensor | None]) -> list[Tensor]:
    """Return the outputs contiguous, and copied where they share memory: an operator must not alias its inputs."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in given(inputs)}
    owned = []
    for tensor in given(outputs):
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owned.append(tensor.clone() if storage in taken else tensor)
        taken.add(owned[-1].untyped_storage().data_ptr())
    return owned


def zeros_where_none(grads: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor]:
    """Replace missing gradients by zeros, for an operator that has to return them all."""
    return [like.new_zeros(like.shape) if grad is None else grad for grad, like in zip(grads, likes, strict=True)]
