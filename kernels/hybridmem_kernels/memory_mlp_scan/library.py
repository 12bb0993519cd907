"""torch.library operators of the chunked scan, for compiled graphs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import own_memory
from .chunked import Inputs, Kept, scan_backward, scan_forward

INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor eta, Tensor theta, Tensor filled, Tensor? document_ids, "
    "Tensor? mask, Tensor[] layers, SymInt chunk_size, float? max_grad_norm, bool even"
)


@torch.library.custom_op("hybridmem::memory_mlp_scan", mutates_args=(), schema=f"({INPUTS}, bool keep) -> Tensor[]")
def memory_mlp_scan_operator(*arguments: Any) -> list[Tensor]:
    """Run `scan_forward`; return its results, followed by the tensors for the backward."""
    *inputs, keep = arguments
    results, kept = scan_forward(Inputs(*inputs), keep)
    return own_memory((*results, *kept.flatten()), (*inputs[:9], *inputs[9]))


@memory_mlp_scan_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *given, keep = arguments
    inputs = Inputs(*given)
    batch, heads, time, _ = inputs.q.shape
    lanes, depth = batch * heads, len(inputs.layers) // 4
    if inputs.even:
        blocks: Any = -(-time // inputs.chunk_size)
        rows: Any = min(inputs.chunk_size, time) + 1
    else:  # the number depends on the positions at which documents begin
        blocks, rows = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    new = inputs.q.new_empty
    shapes = [w.shape for w in inputs.layers[depth : 2 * depth]]
    states = [new(shape, dtype=inputs.dtype) for shape in shapes * 3]
    decays = [new((blocks, lanes, rows, rows + 1), dtype=inputs.dtype) for _ in range(2)]
    starts = [new((blocks if keep else 0, lanes, *shape[2:]), dtype=inputs.dtype) for shape in shapes * 2]
    filled = new((batch,), dtype=torch.long)
    return [inputs.v.new_empty(inputs.v.shape), filled, *states, *decays, *starts]


@torch.library.custom_op(
    "hybridmem::memory_mlp_scan_backward",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor[] kept, Tensor? grad_out, Tensor?[] grads) -> Tensor[]",
)
def memory_mlp_scan_backward_operator(*arguments: Any) -> list[Tensor]:
    """Run `scan_backward`; return the gradients of tokens, followed by the gradients of layers."""
    *inputs, kept, grad_out, grads = arguments
    of_tokens, of_layers = scan_backward(Inputs(*inputs), Kept.unflatten(kept), grad_out, grads)
    return own_memory((*of_tokens, *of_layers), (*inputs[:9], *inputs[9], *kept, grad_out, *grads))


@memory_mlp_scan_backward_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    inputs = Inputs(*arguments[:13])
    return [x.new_empty(x.shape) for x in (*inputs[:6], *inputs.layers)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, layers, chunk_size, max_grad_norm, even, _ = inputs
    results = 2 + 3 * (len(layers) // 4)
    ctx.save_for_backward(*tensors, *layers, *output[results:])
    ctx.layers, ctx.results, ctx.settings = len(layers), results, (chunk_size, max_grad_norm, even)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    tensors, saved = ctx.saved_tensors[:9], list(ctx.saved_tensors[9:])
    layers, kept = saved[: ctx.layers], saved[ctx.layers :]
    arguments = (*tensors, layers, *ctx.settings, kept, grads[0], list(grads[2 : ctx.results]))
    found = memory_mlp_scan_backward_operator(*arguments)
    return *found[:6], None, None, None, found[6:], None, None, None, None


memory_mlp_scan_operator.register_autograd(_backward, setup_context=_setup)
