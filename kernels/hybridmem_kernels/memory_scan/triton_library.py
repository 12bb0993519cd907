"""torch.library operators of the Triton scan and of its single-token step, for compiled graphs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import own_memory, triton_module
from .reference import MemoryState

TOKENS = "Tensor q, Tensor k, Tensor v, Tensor keep, Tensor eta, Tensor theta, Tensor? active, Tensor? continues"
RESULTS = 3  # out, weight, momentum; followed by the tensors for the backward


@torch.library.custom_op(
    "hybridmem::memory_scan_triton",
    mutates_args=(),
    schema=f"({TOKENS}, Tensor weight, Tensor momentum, SymInt chunk_size) -> Tensor[]",
)
def memory_scan_triton_operator(*inputs: Any) -> list[Tensor]:
    """Run `scan_forward`; return its results, followed by the tensors for the backward."""
    results, kept = triton_module(__package__).scan_forward(*inputs)
    return own_memory((*results, *kept), inputs[:-1])


@memory_scan_triton_operator.register_fake
def _(*inputs: Any) -> list[Tensor]:
    q, v, weight, chunk_size = inputs[0], inputs[2], inputs[8], inputs[-1]
    kept = (weight.new_empty(shape) for shape in triton_module(__package__).kept_shapes(q, v, chunk_size))
    return [v.new_empty(v.shape), *(weight.new_empty(weight.shape) for _ in range(2)), *kept]


@torch.library.custom_op(
    "hybridmem::memory_scan_triton_backward",
    mutates_args=(),
    schema=f"({TOKENS}, Tensor[] kept, Tensor?[] grads, SymInt chunk_size) -> Tensor[]",
)
def memory_scan_triton_backward_operator(*inputs: Any) -> list[Tensor]:
    """Run `scan_backward`."""
    *tokens, kept, grads, chunk_size = inputs
    found = triton_module(__package__).scan_backward(*tokens, kept=kept, grads=grads, chunk_size=chunk_size)
    return own_memory(found, (*tokens, *kept, *grads))


@memory_scan_triton_backward_operator.register_fake
def _(*inputs: Any) -> list[Tensor]:
    (q, k, v, keep), errors = inputs[:4], inputs[8][1]
    state = (*q.shape[:2], q.shape[-1], v.shape[-1])
    gates = [errors.new_empty(keep.shape) for _ in range(3)]
    return [*(x.new_empty(x.shape) for x in (q, k, v)), *gates, *(errors.new_empty(state) for _ in range(2))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output[RESULTS:])
    ctx.chunk_size = inputs[-1]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    tokens, kept = ctx.saved_tensors[:8], list(ctx.saved_tensors[8:])
    *of_tokens, weight, momentum = memory_scan_triton_backward_operator(
        *tokens, kept, list(grads[:RESULTS]), ctx.chunk_size
    )
    return *of_tokens, None, None, weight, momentum, None


memory_scan_triton_operator.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op(
    "hybridmem::memory_step_triton",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor eta, Tensor theta, Tensor weight, Tensor momentum, "
        "Tensor? mask) -> (Tensor, Tensor, Tensor)"
    ),
)
def memory_step_triton_operator(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Run `memory_step_triton`; return (out, weight, momentum)."""
    *tokens, weight, momentum, mask = inputs
    step = triton_module(__package__, "triton_decode").memory_step_triton
    out, (weight, momentum) = step(*tokens, MemoryState(weight, momentum), mask)
    return out, weight, momentum


@memory_step_triton_operator.register_fake
def _(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    v, weight, momentum = inputs[2], inputs[6], inputs[7]
    return v.new_empty(v.shape), weight.new_empty(weight.shape), momentum.new_empty(momentum.shape)
