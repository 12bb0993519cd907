"""Linear memory in Triton, as an autograd function.

The forward computes the decays, everything else that needs no state, one pass through the chunks, and the outputs. The
backward repeats the first two, seeds the gradients of states from the outputs, runs the pass in reverse, and computes
the gradients of products, tokens and gates. triton_launch.py launches the kernels, triton_plan.py chooses tile sizes,
and README.md lists the costs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..builds import DTYPES, Build
from ..documents import Gates, effective_gates
from .reference import MemoryState
from .triton_decode import memory_step_triton, step_builds
from .triton_launch import Tokens, backward, forward
from .triton_plan import Launch, Plan, check_supported, make_plan


def memory_scan_triton(
    q: Float[Tensor, "batch heads time key_dim"],
    k: Float[Tensor, "batch heads time key_dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    state: MemoryState,
    document_ids: Int[Tensor, "batch time"] | None,
    mask: Bool[Tensor, "batch time"] | None,
    chunk_size: int,
) -> tuple[Float[Tensor, "batch heads time value_dim"], MemoryState]:
    """Compute (out, state) as defined by the reference, in float32 for all input dtypes.

    Raises:
        ValueError: a dtype other than float32, bfloat16 and float16, a key_dim or value_dim outside 16 to 256, or a
            chunk_size outside 16 to 128.
    """
    check_supported(q, k, v, chunk_size)
    tensors = (q, k, v, alpha, eta, theta, *state)
    if q.shape[2] == 1 and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        if torch.compiler.is_compiling():
            out, *following = torch.ops.hybridmem.memory_step_triton(q, k, v, alpha, eta, theta, *state, mask)
            return out, MemoryState(*following)
        return memory_step_triton(q, k, v, alpha, eta, theta, state, mask)
    gates = effective_gates(alpha, eta, theta, document_ids, mask, torch.float32)
    scan = torch.ops.hybridmem.memory_scan_triton if torch.compiler.is_compiling() else _MemoryScan.apply
    out, weight, momentum = scan(q, k, v, *gates, *state, chunk_size)[:3]
    return out, MemoryState(weight, momentum)


class _MemoryScan(torch.autograd.Function):
    """Autograd function of the scan; it saves the inputs, one state per chunk, and one row of errors per token."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        results, kept = scan_forward(*inputs)
        ctx.save_for_backward(*inputs[:8], *kept)
        ctx.chunk_size = inputs[-1]
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tokens, kept = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        *of_tokens, weight, momentum = scan_backward(*tokens, kept=kept, grads=grads, chunk_size=ctx.chunk_size)
        return *of_tokens, None, None, weight, momentum, None


def scan_forward(
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
    chunk_size: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Compute (out, weight, momentum), and (checkpoints, errors) for the backward."""
    plan, tokens = _prepared(q, k, v, Gates(keep, eta, theta, active, continues), chunk_size)
    state = MemoryState(weight.contiguous(), momentum.contiguous())
    with torch.cuda.device_of(q):
        out, last, states, errors = forward(Launch.run, plan, tokens, state)
    return (out, *last), (_checkpoints(states, plan, tokens), errors)


def scan_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    eta: Tensor,
    theta: Tensor,
    active: Tensor | None,
    continues: Tensor | None,
    *,
    kept: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """Compute gradients of (q, k, v, keep, eta, theta, weight, momentum) from `grads` of (out, weight, momentum)."""
    plan, tokens = _prepared(q, k, v, Gates(keep, eta, theta, active, continues), chunk_size)
    checkpoints, errors = kept
    grad_out, *grad_last = grads
    grad_out = torch.zeros_like(tokens.v) if grad_out is None else torch.empty_like(tokens.v).copy_(grad_out)
    shape = (*q.shape[:2], plan.key_dim, plan.value_dim)
    last = MemoryState(*(errors.new_zeros(shape) if grad is None else grad.contiguous() for grad in grad_last))
    with torch.cuda.device_of(q):
        got = backward(Launch.run, plan, tokens, checkpoints, errors, grad_out, last)
    return got.q, got.k, got.v, *got.gates, got.weight, got.momentum


def kept_shapes(q: Tensor, v: Tensor, chunk_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the checkpoints and the errors."""
    plan = make_plan(q, q, v, chunk_size, hip=False, interpreted=False)
    lanes, chunks = q.shape[0] * q.shape[1], -(-q.shape[2] // plan.size)
    checkpoints = lanes * -(-chunks // plan.spacing)
    return (checkpoints, 2, plan.key_dim, plan.value_dim), (lanes * chunks, plan.size, plan.value_dim)


def _checkpoints(states: Tensor, plan: Plan, tokens: Tokens) -> Tensor:
    """Select the states that the backward needs."""
    if plan.spacing == 1:
        return states
    return states.unflatten(0, (tokens.lanes, -1))[:, :: plan.spacing].flatten(0, 1).contiguous()


def _prepared(q: Tensor, k: Tensor, v: Tensor, gates: Gates, chunk_size: int) -> tuple[Plan, Tokens]:
    plan = make_plan(q, k, v, chunk_size, hip=torch.version.hip is not None, interpreted=triton.knobs.runtime.interpret)
    return plan, Tokens.of(q, k, v, gates)


def builds(
    batch: int,
    heads: int,
    time: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    chunk_size: int = 64,
    hip: bool = False,
) -> list[Build]:
    """List the kernels for these shapes, decoding steps included, by recording a run on meta tensors."""
    q, v = (torch.empty(batch, heads, time, dim, dtype=dtype, device="meta") for dim in (key_dim, value_dim))
    tokens = Tokens(q, q, v, torch.empty(5, batch, heads, time, device="meta"))
    state = MemoryState(*(torch.empty(batch, heads, key_dim, value_dim, device="meta") for _ in range(2)))
    plan = make_plan(q, q, v, chunk_size, hip, interpreted=False)
    launches: list[Launch] = []
    out, last, states, errors = forward(launches.append, plan, tokens, state)
    backward(launches.append, plan, tokens, _checkpoints(states, plan, tokens), errors, out, last)
    found: dict[str, Build] = {}
    for launch in launches:
        build = launch.build(f"{key_dim}x{value_dim} chunk {chunk_size} {DTYPES[dtype]}")
        if build.constexprs != found.get(build.name, build).constexprs:
            build = replace(build, name=f"{build.name} backward")
        found[build.name] = build
    return [*found.values(), *step_builds(key_dim, value_dim, dtype)]
