"""Context parallelism: a sequence split over ranks, with streaming states passed from rank to rank, layer by layer.

Reading a text in pieces gives the same outputs as a single forward. A rank that reads one piece therefore needs only
the states after the previous piece: memory, window and convolutions, whose size does not grow with the text. When a
rank finishes a layer, it sends the layer's state to the next rank, which then runs that layer while the first rank
continues with its next layer. Rank r runs layer l in slot l + r, so size - 1 of layers + size - 1 slots are idle. The
backward runs in the opposite direction and passes the gradients of the states.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from transformers import DynamicCache

from .modeling import HybridMemForCausalLM, HybridMemModel
from .state import map_state


def own_part(x: Shaped[Tensor, "batch time *rest"], group: Any = None) -> Shaped[Tensor, "batch part *rest"]:
    """Return this rank's piece of a sequence.

    Raises:
        ValueError: the sequence has fewer tokens than the group has ranks.
    """
    size = dist.get_world_size(group)
    if x.shape[1] < size:
        raise ValueError(f"{x.shape[1]} tokens cannot be split over {size} ranks: give each rank at least one token")
    return x.tensor_split(size, dim=1)[dist.get_rank(group)].contiguous()  # losses require contiguous tensors


@contextmanager
def handed_over(model: HybridMemForCausalLM | HybridMemModel, group: Any = None) -> Iterator[DynamicCache]:
    """Provide a cache with which the model continues from the previous rank's states.

        with handed_over(model) as cache:
            loss = model(own_part(ids), past_key_values=cache, shift_labels=own_part(labels)).loss
        loss.backward()
        sum_gradients(model)

    Every rank of the group must run one forward inside the context, and all ranks or none must run the backward. All
    ranks or none must pass `document_ids`. Layers of variant `full` send all keys so far.

    Args:
        model: the model, with identical weights on every rank.
        group: the ranks, in the order of the pieces; None: all ranks.

    Raises:
        ValueError: activation checkpointing is enabled, which discards states.
    """
    if model.is_activation_checkpointing:
        raise ValueError(
            "context parallelism passes states between ranks, but activation checkpointing discards them: disable it"
        )
    inner: HybridMemModel = model.base_model
    cache = DynamicCache(config=model.config)
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1

    def take(number: int) -> None:
        if rank > 0:
            layer: Any = cache.layers[number]
            layer.state, layer.seen_tokens, layer.last_document = _receive(rank - 1, group, model.device)
            layer.is_initialized = True

    def give(number: int, hidden: Tensor) -> Tensor:
        if rank == last:
            return hidden
        layer: Any = cache.layers[number]
        return hidden + _send((layer.state, layer.seen_tokens, layer.last_document), rank + 1, group).to(hidden.dtype)

    # The first layer's state also holds the position of the piece, which the model needs before it runs the layers.
    hooks = [inner.register_forward_pre_hook(lambda *_: take(0))]
    for number, layer in enumerate(inner.layers):
        if number:
            hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: take(number)))
        hooks.append(layer.register_forward_hook(lambda *arguments, number=number: give(number, arguments[-1])))
    try:
        yield cache
    finally:
        for hook in hooks:
            hook.remove()


def sum_gradients(model: torch.nn.Module, group: Any = None) -> None:
    """Sum the gradients over all ranks; each rank has computed the gradients of its own piece's loss."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)


def _send(carried: tuple[Any, int, Any], to: int, group: Any) -> Tensor:
    """Send a layer's state; return a zero whose backward receives the gradient of that state."""
    tensors = _tensors(carried)
    shapes = _each(carried, lambda x: x.to("meta"))
    dist.send_object_list([shapes], group=group, group_dst=to, device=tensors[0].device)
    for tensor in tensors:
        if not tensor.is_floating_point():
            dist.send(tensor.contiguous(), group=group, group_dst=to)
    return _Send.apply(to, group, *(tensor for tensor in tensors if tensor.is_floating_point()))


def _receive(source: int, group: Any, device: torch.device) -> tuple[Any, int, Any]:
    """Receive a state sent by `_send`."""
    message: list[Any] = [None]
    dist.recv_object_list(message, group=group, group_src=source, device=device)
    empty = [torch.empty(shape.shape, dtype=shape.dtype, device=device) for shape in _tensors(message[0])]
    for tensor in empty:
        if not tensor.is_floating_point():
            dist.recv(tensor, group=group, group_src=source)
    anchor = torch.zeros((), device=device, requires_grad=True)  # makes autograd run the backward
    received = iter(_Receive.apply(source, group, anchor, *(x for x in empty if x.is_floating_point())))
    filled = iter([next(received) if tensor.is_floating_point() else tensor for tensor in empty])
    return _each(message[0], lambda _: next(filled))


def _each(carried: tuple[Any, int, Any], function: Callable[[Tensor], Tensor]) -> tuple[Any, int, Any]:
    """Apply `function` to every tensor of a state and of its position."""
    state, seen_tokens, last_document = carried
    state, last_document = map_state(function, (state, last_document))
    return state, seen_tokens, last_document


def _tensors(carried: tuple[Any, int, Any]) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _each(carried, note)
    return found


class _Send(torch.autograd.Function):
    """Forward sends tensors, backward receives their gradients."""

    @staticmethod
    def forward(ctx: Any, to: int, group: Any, *tensors: Tensor) -> Tensor:
        ctx.to, ctx.group = to, group
        ctx.shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        for tensor in tensors:
            dist.send(tensor.contiguous(), group=group, group_dst=to)
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes]
        for gradient in gradients:
            dist.recv(gradient, group=ctx.group, group_src=ctx.to)
        return None, None, *gradients


class _Receive(torch.autograd.Function):
    """Forward receives tensors, backward sends their gradients."""

    @staticmethod
    def forward(ctx: Any, source: int, group: Any, anchor: Tensor, *empty: Tensor) -> tuple[Tensor, ...]:
        ctx.source, ctx.group = source, group
        for tensor in empty:
            dist.recv(tensor, group=group, group_src=source)
        ctx.mark_dirty(*empty)
        return empty

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for gradient in gradients:
            dist.send(gradient.contiguous(), group=ctx.group, group_dst=ctx.source)
        return None, None, gradients[0].new_zeros(()), *[None] * len(gradients)
