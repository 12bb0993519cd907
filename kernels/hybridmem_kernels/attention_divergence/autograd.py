"""Tiled comparison as an autograd function and in compiled graphs, shared by both backends."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import AttentionPolicy, AttentionStats


class Settings(NamedTuple):
    """Settings of a comparison: each policy's scale, window and persistent keys, and the kind of divergence."""

    scale: float
    window: int | None
    num_persistent: int
    scale_ref: float
    window_ref: int | None
    num_persistent_ref: int
    exclude_self: bool
    divergence: str


class _AttentionDivergence(torch.autograd.Function):
    """Autograd function of the stats; it saves the inputs and the tensors kept by a backend's forward."""

    @staticmethod
    def forward(
        ctx: Any, compare_forward: Callable[..., Any], compare_backward: Callable[..., Any], *arguments: Any
    ) -> tuple[Tensor, ...]:
        tensors, settings = arguments[:6], Settings(*arguments[6:])
        stats, kept = compare_forward(*tensors, settings=settings)
        ctx.save_for_backward(*tensors, *kept)
        ctx.compare_backward, ctx.settings = compare_backward, settings
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(stats[2])
        return stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, kept = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        found = ctx.compare_backward(*tensors, kept=kept, grads=grads, settings=ctx.settings)
        return None, None, *found, *(None,) * 12


def compare_policies(
    operator: str,
    compare_forward: Callable[..., Any],
    compare_backward: Callable[..., Any],
    policy: AttentionPolicy,
    policy_ref: AttentionPolicy,
    query_mask: Bool[Tensor, "batch queries"] | None,
    key_mask: Bool[Tensor, "batch keys"] | None,
    exclude_self: bool,
    divergence: str,
) -> AttentionStats:
    """Compute the stats with a backend's forward, differentiable by its backward.

    In a compiled graph, the torch.library operator named `operator` replaces both functions.
    """
    tensors = (policy.q, policy.k, policy_ref.q, policy_ref.k, query_mask, key_mask)
    settings = (*policy[2:], *policy_ref[2:], exclude_self, divergence)
    if torch.compiler.is_compiling():
        stats = getattr(torch.ops.hybridmem, operator)(*tensors, *settings)
    else:
        stats = _AttentionDivergence.apply(compare_forward, compare_backward, *tensors, *settings)
    return AttentionStats(*stats[:4])
