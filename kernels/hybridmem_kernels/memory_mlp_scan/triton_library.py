"""torch.library operators of the Triton scan, for compiled graphs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import given, own_memory, triton_module, zeros_where_none
from .chunked import Inputs
from .library import INPUTS


@torch.library.custom_op("hybridmem::memory_mlp_scan_triton", mutates_args=(), schema=f"({INPUTS}) -> Tensor[]")
def memory_mlp_scan_triton_operator(*arguments: Any) -> list[Tensor]:
    """Compute out, filled, the layers of weights, momenta and anchors, and the states before every chunk."""
    inputs = Inputs._make(arguments)
    call = triton_module(__package__).Call.of(inputs)
    learned, *state = call.pack(inputs.layers)
    if call.blocks.times.numel():
        (out, *ends), states = triton_module(__package__).scan_forward(call, *inputs[:6], learned, *state)
        states[:, -1, 1] = 0  # the given anchors have no momenta, and uninitialised memory must not be returned
    else:  # every token is padding
        out, ends, states = torch.zeros_like(inputs.v), state, learned.new_zeros(_states(inputs, 2))
    layers = [w for packed in ends for w in call.unpack(packed)]
    return own_memory((out, call.blocks.filled, *layers, states), given((*inputs[:9], *inputs.layers)))


@memory_mlp_scan_triton_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    inputs = Inputs._make(arguments)
    count: Any = -(-inputs.q.shape[2] // inputs.chunk_size) + 2
    if not inputs.even:  # the number depends on the positions at which documents begin
        count = torch.library.get_ctx().new_dynamic_size()
    state = inputs.layers[len(inputs.layers) // 4 :]
    new = inputs.alpha.new_empty
    layers = [new(w.shape, dtype=torch.float32) for w in state]
    filled = inputs.filled.new_empty(inputs.filled.shape)
    return [inputs.v.new_empty(inputs.v.shape), filled, *layers, new(_states(inputs, count), dtype=torch.float32)]


@torch.library.custom_op(
    "hybridmem::memory_mlp_scan_triton_backward",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor states, Tensor? grad_out, Tensor?[] grads) -> Tensor[]",
)
def memory_mlp_scan_triton_backward_operator(*arguments: Any) -> list[Tensor]:
    """Compute the gradients of tokens, followed by the gradients of layers."""
    inputs, (states, grad_out, grads) = Inputs._make(arguments[:13]), arguments[13:]
    call = triton_module(__package__).Call.of(inputs)
    depth = len(inputs.layers) // 4
    packed = call.pack(zeros_where_none(grads, inputs.layers[depth:]))
    if call.blocks.times.numel():
        (grad_out,) = zeros_where_none([grad_out], [inputs.v])
        found = triton_module(__package__).scan_backward(call, *inputs[:6], states=states, grads=(grad_out, *packed))
    else:
        found = [*(torch.zeros_like(x) for x in inputs[:6]), torch.zeros_like(packed[0][0]), *packed]
    layers = [w for group in found[6:] for w in call.unpack(group)]
    likes = (*inputs[:6], *inputs.layers)
    cast = [x.to(like.dtype) for x, like in zip((*found[:6], *layers), likes, strict=True)]
    return own_memory(cast, given((*inputs[:9], *inputs.layers, states, grad_out, *grads)))


@memory_mlp_scan_triton_backward_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    inputs = Inputs._make(arguments[:13])
    return [x.new_empty(x.shape) for x in (*inputs[:6], *inputs.layers)]


def _states(inputs: Inputs, count: Any) -> tuple[Any, ...]:
    """Return the shape of `count` states of every lane."""
    batch, heads = inputs.q.shape[:2]
    shape = triton_module(__package__).shape_of(triton_module(__package__).widths_of(inputs), inputs.chunk_size)
    return (batch * heads, count, 2, shape.state_size)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, layers, chunk_size, max_grad_norm, even = inputs
    ctx.save_for_backward(*tensors, *layers, output[-1])
    ctx.settings = (chunk_size, max_grad_norm, even)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    *saved, states = ctx.saved_tensors
    tensors, layers = saved[:9], list(saved[9:])
    found = memory_mlp_scan_triton_backward_operator(
        *tensors, layers, *ctx.settings, states, grads[0], list(grads[2:-1])
    )
    return *found[:6], None, None, None, found[6:], None, None, None


memory_mlp_scan_triton_operator.register_autograd(_backward, setup_context=_setup)
