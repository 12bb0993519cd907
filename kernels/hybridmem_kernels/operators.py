"""What the operators of torch.library share.

An operator's forward and backward are two functions of tensors. An eager call reaches them through a
torch.autograd.Function, which costs least. torch.compile would trace through that one, loop by loop, so in its graphs
they are two operators of torch.library, which it leaves whole; the first returns what the second needs behind its
results, for an operator keeps nothing to itself.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor


def given(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Those that are there."""
    return [tensor for tensor in tensors if tensor is not None]


def own_memory(outputs: Iterable[Tensor | None], inputs: Iterable[Tensor | None]) -> list[Tensor]:
    """The outputs that are there, contiguous, and copied where they lie in an input: an operator must not alias."""
    taken = {tensor.untyped_storage().data_ptr() for tensor in given(inputs)}
    owned = []
    for tensor in given(outputs):
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        owned.append(tensor.clone() if storage in taken else tensor)
        taken.add(owned[-1].untyped_storage().data_ptr())
    return owned


def zeros_where_none(grads: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor]:
    """Gradients for an operator that has to return them all."""
    return [like.new_zeros(like.shape) if grad is None else grad for grad, like in zip(grads, likes, strict=True)]
