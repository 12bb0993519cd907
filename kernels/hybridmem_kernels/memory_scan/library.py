"""torch.library operators of the chunked scan, for compiled graphs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import own_memory
from .chunked import Chunks, scan_backward, scan_forward

RESULTS = 3  # out, weight, momentum; followed by the tensors for the backward


@torch.library.custom_op(
    "hybridmem::memory_scan",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor keep, Tensor eta, Tensor theta, Tensor? active, Tensor? continues, "
        "Tensor weight, Tensor momentum, SymInt size) -> Tensor[]"
    ),
)
def memory_scan_operator(*inputs: Any) -> list[Tensor]:
    """Run `scan_forward`; return its results, followed by the fields of the chunks."""
    results, chunks = scan_forward(*inputs)
    return own_memory((*results, *chunks), inputs[:-1])


@memory_scan_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    eta: Tensor,
    theta: Tensor,
    active: Tensor | None,
    continues: Tensor | None,
    weight: Tensor,
    momentum: Tensor,
    size: int,
) -> list[Tensor]:
    (batch, heads, time, key_dim), value_dim = q.shape, v.shape[-1]
    lanes = batch * heads
    n = lanes * (time // size)
    gates = 2 + (active is not None) + (continues is not None)
    saved: list[tuple[int, ...]] = [(n, size, key_dim)] * 2  # queries, keys
    saved += [(n, size)] * gates
    saved += [(n, size + 1, size + 2)] * 2  # weight_rows, momentum_rows
    saved += [(n, size, size)] * 3  # key_products, query_products, inverse
    saved += [(n, size, 2 * key_dim), (n, size, value_dim), (n + lanes, 2 * key_dim, value_dim), (n, 2, 2)]
    results = [v.new_empty(v.shape), weight.new_empty(weight.shape), momentum.new_empty(momentum.shape)]
    return [*results, *(weight.new_empty(shape) for shape in saved)]


@torch.library.custom_op(
    "hybridmem::memory_scan_backward",
    mutates_args=(),
    schema=(
        "(Tensor?[] chunks, Tensor? grad_out, Tensor? grad_weight, Tensor? grad_momentum, SymInt[] shape, "
        "ScalarType[] dtypes) -> Tensor[]"
    ),
)
def memory_scan_backward_operator(
    chunks: Sequence[Any],
    grad_out: Tensor | None,
    grad_weight: Tensor | None,
    grad_momentum: Tensor | None,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Run `scan_backward`."""
    grads = (grad_out, grad_weight, grad_momentum)
    return own_memory(scan_backward(Chunks._make(chunks), grads, shape, dtypes), (*chunks, *grads))


@memory_scan_backward_operator.register_fake
def _(
    chunks: Sequence[Any],
    grad_out: Tensor | None,
    grad_weight: Tensor | None,
    grad_momentum: Tensor | None,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    (batch, heads), keys, errors = shape, Chunks._make(chunks).keys, Chunks._make(chunks).errors
    (n, size, key_dim), value_dim = keys.shape, errors.shape[-1]
    time = n // (batch * heads) * size
    tokens = [
        keys.new_empty((batch, heads, time, dim), dtype=dtype)
        for dim, dtype in zip((key_dim, key_dim, value_dim), dtypes, strict=True)
    ]
    gates = [keys.new_empty((batch, heads, time)) for _ in range(3)]
    states = [keys.new_empty((batch, heads, key_dim, value_dim)) for _ in range(2)]
    return [*tokens, *gates, *states]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, active, continues = inputs[0], inputs[6], inputs[7]
    chunks: list[Tensor | None] = list(output[RESULTS:])
    for place, gate in ((4, active), (5, continues)):  # a gate that is None here is also None in `Chunks`
        if gate is None:
            chunks.insert(place, None)
    ctx.save_for_backward(*chunks)
    ctx.shape, ctx.dtypes = q.shape[:2], [x.dtype for x in inputs[:3]]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *tokens_and_gates, weight, momentum = memory_scan_backward_operator(
        ctx.saved_tensors, *grads[:RESULTS], ctx.shape, ctx.dtypes
    )
    return *tokens_and_gates, None, None, weight, momentum, None


memory_scan_operator.register_autograd(_backward, setup_context=_setup)
