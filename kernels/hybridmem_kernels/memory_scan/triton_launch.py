"""Sequences of kernel launches for the forward and the backward of the linear memory.

Each launch is passed to `run`, which executes it, or records it for ahead-of-time builds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..documents import Gates
from .reference import MemoryState
from .triton_forward import chunk_kernel, decay_kernel, output_kernel, scan_kernel
from .triton_plan import Launch, Plan
from .triton_state_backward import adjoint_kernel, restore_kernel, seed_kernel
from .triton_tiles import COLUMNS
from .triton_token_backward import gate_gradient_kernel, mix_gradient_kernel, token_gradient_kernel

Run = Callable[[Launch], Any]


class Tokens(NamedTuple):
    """Inputs without gaps, whose strides `torch.empty_like` preserves; gates are (gate, batch, heads, time)."""

    q: Float[Tensor, "batch heads time key_dim"]
    k: Float[Tensor, "batch heads time key_dim"]
    v: Float[Tensor, "batch heads time value_dim"]
    gates: Float[Tensor, "5 batch heads time"]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> "Tokens":
        """Copy tensors with gaps, and keys whose strides differ from the queries'; keep all others."""
        q, k, v = (_without_gaps(x) for x in (q, k, v))
        if q.stride() != k.stride():
            q, k = q.contiguous(), k.contiguous()
        ones = torch.ones_like(gates.keep)
        return cls(q, k, v, torch.stack([ones if gate is None else gate for gate in gates]))

    @property
    def lanes(self) -> int:
        """Return the number of lanes: independent (batch, head) pairs."""
        return self.q.shape[0] * self.q.shape[1]

    def place(self, size: int) -> dict[str, int]:
        """Return the layout of keys and queries as kernel arguments."""
        time = self.q.shape[2]
        names = ("key_batch", "key_head", "key_time")
        strides = dict(zip(names, self.q.stride(), strict=False))
        return dict(heads=self.q.shape[1], time=time, chunks=-(-time // size), **strides)

    def value_place(self) -> dict[str, int]:
        """Return the layout of values and outputs as kernel arguments."""
        return dict(zip(("value_batch", "value_head", "value_time"), self.v.stride(), strict=False))


def _without_gaps(x: Tensor) -> Tensor:
    dense = x.stride() == torch.empty_like(x, device="meta").stride() and x.stride(-1) == 1
    return x if dense else x.contiguous()


class Chunks(NamedTuple):
    """Tensors of all chunks that do not depend on the chunks' states."""

    rows: Float[Tensor, "n rows size"]  # R_w without the columns of the state
    moving: Float[Tensor, "n rows size"]  # R_s without the columns of the state, only for the backward
    columns: Float[Tensor, "n columns size"]
    inverse: Float[Tensor, "n size size"]
    mix: Float[Tensor, "n size size"]  # D * Q K^T


def _prepare(run: Run, plan: Plan, tokens: Tokens, backward: bool) -> Chunks:
    place, size = tokens.place(plan.size), plan.size
    count, new = tokens.lanes * place["chunks"], tokens.gates.new_empty
    rows = new(count, size + 1, size)
    moving = torch.empty_like(rows) if backward else rows  # a placeholder in the forward, never written
    chunks = Chunks(rows, moving, new(count, COLUMNS.value, size), new(count, size, size), new(count, size, size))
    gates: dict[str, Any] = dict(gates_ptr=tokens.gates, rows_ptr=rows, lanes=tokens.lanes)
    arguments: dict[str, Any] = dict(
        gates, moving_ptr=moving, columns_ptr=chunks.columns, time=place["time"], chunks=place["chunks"]
    )
    run(Launch(decay_kernel, (count,), arguments, dict(SIZE=size, KEEP_MOVING=backward), 1, has_dots=False))
    arguments = dict(gates, q_ptr=tokens.q, k_ptr=tokens.k, inverse_ptr=chunks.inverse, mix_ptr=chunks.mix, **place)
    constexprs = {name: plan.tile[name] for name in ("KEY_DIM", "KEY_BLOCK", "SIZE", "PRECISION")}
    run(Launch(chunk_kernel, (count,), arguments, dict(constexprs, EXACT=plan.exact), plan.chunk_warps))
    return chunks


def forward(run: Run, plan: Plan, tokens: Tokens, state: MemoryState) -> tuple[Tensor, MemoryState, Tensor, Tensor]:
    """Compute (out, last state, states before every chunk, errors)."""
    chunks = _prepare(run, plan, tokens, backward=False)
    place = tokens.place(plan.size)
    values, count = tokens.value_place(), len(chunks.mix)
    states = tokens.gates.new_empty(count, 2, plan.key_dim, plan.value_dim)
    errors = tokens.gates.new_empty(count, plan.size, plan.value_dim)
    last = MemoryState(*(torch.empty_like(x) for x in state))
    arguments: dict[str, Any] = dict(
        k_ptr=tokens.k,
        v_ptr=tokens.v,
        inverse_ptr=chunks.inverse,
        columns_ptr=chunks.columns,
        weight_ptr=state.weight,
        momentum_ptr=state.momentum,
        states_ptr=states,
        errors_ptr=errors,
        last_weight_ptr=last.weight,
        last_momentum_ptr=last.momentum,
        **place,
        **values,
    )
    run(Launch(scan_kernel, (tokens.lanes, plan.value_blocks(plan.scan_tile)), arguments, plan.scan_tile))
    out = torch.empty_like(tokens.v)
    arguments = dict(
        q_ptr=tokens.q,
        mix_ptr=chunks.mix,
        columns_ptr=chunks.columns,
        states_ptr=states,
        errors_ptr=errors,
        out_ptr=out,
        **place,
        **values,
    )
    run(Launch(output_kernel, (count, plan.value_blocks(plan.wide_tile)), arguments, plan.wide_tile))
    return out, last, states, errors


def _restore(
    run: Run, plan: Plan, tokens: Tokens, chunks: Chunks, checkpoints: Tensor, errors: Tensor
) -> Float[Tensor, "n 2 key_dim value_dim"]:
    """Recompute the states before every chunk from the checkpoints."""
    if plan.spacing == 1:
        return checkpoints
    states = checkpoints.new_empty(len(errors), *checkpoints.shape[1:])
    arguments: dict[str, Any] = dict(
        k_ptr=tokens.k,
        columns_ptr=chunks.columns,
        checkpoints_ptr=checkpoints,
        errors_ptr=errors,
        states_ptr=states,
        checkpoints=len(checkpoints) // tokens.lanes,
        **tokens.place(plan.size),
    )
    grid = (len(checkpoints), plan.key_blocks, plan.value_blocks(plan.tile))
    run(Launch(restore_kernel, grid, arguments, plan.tile))
    return states


class Grads(NamedTuple):
    """Gradients of q, k, v, of (keep, eta, theta) and of the state."""

    q: Float[Tensor, "batch heads time key_dim"]
    k: Float[Tensor, "batch heads time key_dim"]
    v: Float[Tensor, "batch heads time value_dim"]
    gates: Float[Tensor, "3 batch heads time"]
    weight: Float[Tensor, "batch heads key_dim value_dim"]
    momentum: Float[Tensor, "batch heads key_dim value_dim"]


class Known(NamedTuple):
    """Tensors that the backward of every chunk reads."""

    states: Float[Tensor, "n 2 key_dim value_dim"]  # before the chunk
    errors: Float[Tensor, "n size value_dim"]
    grad_out: Float[Tensor, "batch heads time value_dim"]


class Adjoints(NamedTuple):
    """Gradients of the states after every chunk and of its solved errors."""

    ends: Float[Tensor, "n 2 key_dim value_dim"]
    residuals: Float[Tensor, "n size value_dim"]


def backward(
    run: Run,
    plan: Plan,
    tokens: Tokens,
    checkpoints: Tensor,
    errors: Tensor,
    grad_out: Tensor,
    grad_last: MemoryState,
) -> Grads:
    """Compute the gradients of the inputs from the gradients of the outputs and of the last state."""
    chunks = _prepare(run, plan, tokens, backward=True)
    known = Known(_restore(run, plan, tokens, chunks, checkpoints, errors), errors, grad_out)
    q, k, v, weight, momentum = (torch.empty_like(x) for x in (*tokens[:3], *grad_last))
    grads = Grads(q, k, v, tokens.gates.new_empty(3, *tokens.gates.shape[1:]), weight, momentum)
    adjoints = _adjoints(run, plan, tokens, chunks, known, grad_last, grads)
    squares = _mix_gradients(run, plan, tokens, chunks, known, adjoints)
    sums = _token_gradients(run, plan, tokens, chunks, known, adjoints, grads)
    _gate_gradients(run, plan, tokens, chunks, squares, sums, grads)
    return grads


def _adjoints(
    run: Run, plan: Plan, tokens: Tokens, chunks: Chunks, known: Known, grad_last: MemoryState, grads: Grads
) -> Adjoints:
    """Compute the gradients of v and of the states, from the last chunk to the first."""
    adjoints = Adjoints(torch.empty_like(known.states), torch.empty_like(known.errors))
    shared: dict[str, Any] = dict(
        columns_ptr=chunks.columns,
        grad_ends_ptr=adjoints.ends,
        grad_residuals_ptr=adjoints.residuals,
        grad_weight_ptr=grads.weight,
        grad_momentum_ptr=grads.momentum,
        **tokens.place(plan.size),
        **tokens.value_place(),
    )
    arguments = dict(shared, q_ptr=tokens.q, mix_ptr=chunks.mix, grad_out_ptr=known.grad_out)
    run(Launch(seed_kernel, (len(known.errors), plan.value_blocks(plan.wide_tile)), arguments, plan.wide_tile))
    arguments = dict(
        shared,
        k_ptr=tokens.k,
        inverse_ptr=chunks.inverse,
        grad_v_ptr=grads.v,
        grad_last_weight_ptr=grad_last.weight,
        grad_last_momentum_ptr=grad_last.momentum,
    )
    run(Launch(adjoint_kernel, (tokens.lanes, plan.value_blocks(plan.scan_tile)), arguments, plan.scan_tile))
    return adjoints


def _mix_gradients(
    run: Run, plan: Plan, tokens: Tokens, chunks: Chunks, known: Known, adjoints: Adjoints
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the decays before and after each token's write.

    The gradients of N and of D * Q K^T times these decays replace `chunks.inverse` and `chunks.mix`.
    """
    before, after = (torch.empty_like(chunks.mix) for _ in range(2))
    arguments: dict[str, Any] = dict(
        q_ptr=tokens.q,
        k_ptr=tokens.k,
        gates_ptr=tokens.gates,
        rows_ptr=chunks.rows,
        errors_ptr=known.errors,
        grad_residuals_ptr=adjoints.residuals,
        grad_out_ptr=known.grad_out,
        strict_ptr=chunks.inverse,
        mix_ptr=chunks.mix,
        grad_before_ptr=before,
        grad_after_ptr=after,
        lanes=tokens.lanes,
        **tokens.place(plan.size),
        **tokens.value_place(),
    )
    warps = 4 if plan.wide > plan.width else 8  # a wide tile needs only one pass
    run(Launch(mix_gradient_kernel, (len(known.errors),), arguments, plan.wide_tile, warps))
    return before, after


def _token_gradients(
    run: Run, plan: Plan, tokens: Tokens, chunks: Chunks, known: Known, adjoints: Adjoints, grads: Grads
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of q and k; return the gradients of the columns and of the decays of whole chunks."""
    count, parts = len(known.errors), plan.key_blocks
    grad_columns = chunks.columns.new_empty(count, parts, *chunks.columns.shape[1:])
    grad_carry = chunks.columns.new_empty(count, parts, 3)
    arguments: dict[str, Any] = dict(
        q_ptr=tokens.q,
        k_ptr=tokens.k,
        columns_ptr=chunks.columns,
        states_ptr=known.states,
        grad_ends_ptr=adjoints.ends,
        errors_ptr=known.errors,
        grad_residuals_ptr=adjoints.residuals,
        grad_out_ptr=known.grad_out,
        strict_ptr=chunks.inverse,
        mix_ptr=chunks.mix,
        grad_q_ptr=grads.q,
        grad_k_ptr=grads.k,
        grad_columns_ptr=grad_columns,
        grad_carry_ptr=grad_carry,
        **tokens.place(plan.size),
        **tokens.value_place(),
    )
    run(Launch(token_gradient_kernel, (count, parts), arguments, plan.tile))
    return (grad_columns.sum(1), grad_carry.sum(1)) if parts > 1 else (grad_columns, grad_carry)


def _gate_gradients(
    run: Run,
    plan: Plan,
    tokens: Tokens,
    chunks: Chunks,
    squares: tuple[Tensor, Tensor],
    sums: tuple[Tensor, Tensor],
    grads: Grads,
) -> None:
    """Compute the gradients of the gates."""
    place = tokens.place(plan.size)
    arguments: dict[str, Any] = dict(
        gates_ptr=tokens.gates,
        rows_ptr=chunks.rows,
        moving_ptr=chunks.moving,
        columns_ptr=chunks.columns,
        grad_before_ptr=squares[0],
        grad_after_ptr=squares[1],
        grad_columns_ptr=sums[0],
        grad_carry_ptr=sums[1],
        grad_gates_ptr=grads.gates,
        lanes=tokens.lanes,
        time=place["time"],
        chunks=place["chunks"],
    )
    run(Launch(gate_gradient_kernel, (len(chunks.mix),), arguments, dict(SIZE=plan.size), 1, has_dots=False))
