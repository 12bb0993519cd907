"""torch.library operators of the tiled comparison, one for each backend, for compiled graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..library import own_memory, triton_module
from ..memory_scan.reference import state_dtype
from .autograd import Settings
from .chunked import compare_backward, compare_forward
from .chunked_blocks import needed_queries

TENSORS = "Tensor q, Tensor k, Tensor q_ref, Tensor k_ref, Tensor? query_mask, Tensor? key_mask"
SETTINGS = (
    "float scale, SymInt? window, SymInt num_persistent, float scale_ref, SymInt? window_ref, "
    "SymInt num_persistent_ref, bool exclude_self, str divergence"
)
STATS = 4  # divergence, entropy, entropy_ref, mass; followed by the tensors for the backward


def define(name: str, forward: Callable[..., Any], backward: Callable[..., Any], kept: str) -> Any:
    """Register an operator and its backward.

    `kept` has a letter for each saved tensor: "p" or "r" for tensors with the heads of p or p_ref, "-" for tensors
    without heads.
    """

    @torch.library.custom_op(f"hybridmem::{name}", mutates_args=(), schema=f"({TENSORS}, {SETTINGS}) -> Tensor[]")
    def operator(*arguments: Any) -> list[Tensor]:
        stats, saved = forward(*arguments[:6], settings=Settings(*arguments[6:]))
        return own_memory((*stats, *saved), arguments[:6])

    @operator.register_fake
    def _(*arguments: Any) -> list[Tensor]:
        q, _, q_ref = arguments[:3]
        per_query = (q.shape[0], q.shape[2])
        shapes = {"p": q.shape[:3], "r": q_ref.shape[:3], "-": per_query}
        dtype = state_dtype(q.dtype)
        return [q.new_empty(shapes[whose], dtype=dtype) for whose in "-" * STATS + kept]

    @torch.library.custom_op(
        f"hybridmem::{name}_backward",
        mutates_args=(),
        schema=f"({TENSORS}, Tensor[] kept, Tensor?[] grads, {SETTINGS}) -> Tensor[]",
    )
    def backward_operator(*arguments: Any) -> list[Tensor]:
        tensors, saved, grads, settings = arguments[:6], arguments[6], arguments[7], Settings(*arguments[8:])
        return own_memory(backward(*tensors, kept=saved, grads=grads, settings=settings), tensors)

    @backward_operator.register_fake
    def _(*arguments: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in arguments[:2]]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.save_for_backward(*inputs[:6], *output[STATS:])
        ctx.settings = inputs[6:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])

    def differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        tensors, saved = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
        return *backward_operator(*tensors, saved, list(grads[:STATS]), *ctx.settings), *(None,) * 12

    operator.register_autograd(differentiate, setup_context=setup)
    return operator


def _forward_of_every_query(*tensors: Any, settings: Settings) -> Any:
    """Run `compare_forward` with tensors for all queries, because the number of needed queries depends on the data."""
    stats, kept = compare_forward(*tensors, settings=settings)
    needed = needed_queries(tensors[0], tensors[4])
    whole = [x.new_zeros(*x.shape[:-1], tensors[0].shape[2]) for x in kept]
    for into, x in zip(whole, kept, strict=True):
        into[..., needed] = x
    return stats, whole


def _backward_of_every_query(*tensors: Any, kept: Sequence[Tensor], **others: Any) -> Any:
    needed = needed_queries(tensors[0], tensors[4])
    return compare_backward(*tensors, kept=[x[..., needed] for x in kept], **others)


def _triton(function: str) -> Callable[..., Any]:
    """Return a function of triton_autograd.py, which is imported lazily on the first call."""
    return lambda *tensors, **others: getattr(triton_module(__package__), function)(*tensors, **others)


attention_divergence_operator = define(
    "attention_divergence", _forward_of_every_query, _backward_of_every_query, kept="p-r-"
)
attention_divergence_triton_operator = define(
    "attention_divergence_triton", _triton("compare_forward"), _triton("compare_backward"), kept="pr----"
)
