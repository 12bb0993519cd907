"""Linear memory along a sequence that is split over ranks, which all scan in parallel.

The recurrence is affine in its initial state: with z = [W; S], a rank's tokens give z' = T z + b and o_t = A_t z + c_t.
T and A_t do not depend on values. One scan computes all four: its values are padded with columns of zeros, and its
initial state is zero in the columns of the values and the identity in the added columns. No rank has to wait for
another one to scan. Then the ranks all-gather T and b, 6 dim² numbers per head for keys and values of dim channels.
Each rank combines the contributions of the previous ranks to z and adds A_t z. The scan is three times as wide.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from . import memory_scan
from .reference import MemoryState, state_dtype


def memory_scan_over_ranks(
    q: Float[Tensor, "batch heads time key_dim"],
    k: Float[Tensor, "batch heads time key_dim"],
    v: Float[Tensor, "batch heads time value_dim"],
    alpha: Float[Tensor, "batch heads time"],
    eta: Float[Tensor, "batch heads time"],
    theta: Float[Tensor, "batch heads time"],
    *,
    chunk_size: int = 64,
    document_ids: Int[Tensor, "batch time"] | None = None,
    group: Any = None,
) -> tuple[Float[Tensor, "batch heads time value_dim"], MemoryState]:
    """Read and write a linear memory along a sequence whose consecutive parts are held by the ranks of a group.

    Args:
        q, k, v, alpha, eta, theta, chunk_size, document_ids: as in `memory_scan`, for this rank's tokens, at least one.
            All ranks or none must pass document_ids.
        group: the ranks; None: all ranks.

    Returns:
        out of this rank's tokens and the state after them, equal to the results of `memory_scan` on the whole sequence.
    """
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    shape = (*q.shape[:2], key_dim, value_dim)
    identity = torch.eye(2 * key_dim, dtype=state_dtype(q.dtype), device=q.device).expand(*q.shape[:2], -1, -1)
    starts = (
        torch.cat((part.new_zeros(shape), part), dim=-1)
        for part in (identity[:, :, :key_dim], identity[:, :, key_dim:])
    )
    values = torch.cat((v, v.new_zeros(*v.shape[:-1], 2 * key_dim)), dim=-1)
    gates = (alpha, eta, theta)
    out, (weight, momentum) = memory_scan(
        q, k, values, *gates, MemoryState(*starts), chunk_size=chunk_size, document_ids=document_ids
    )
    reach, ends = out[..., value_dim:], torch.cat((weight, momentum), dim=2)
    left, carry = ends[..., :value_dim], ends[..., value_dim:]
    if document_ids is not None:
        goes_on = _continues(document_ids, group)[:, None, None, None]
        reach, carry = reach.where(goes_on, 0), carry.where(goes_on, 0)
    before = _before(left, carry, group)
    whole = (carry @ before + left).split(key_dim, dim=2)
    return out[..., :value_dim] + (reach.to(before.dtype) @ before).to(v.dtype), MemoryState(*whole)


def _before(
    left: Float[Tensor, "batch heads pair value_dim"], carry: Float[Tensor, "batch heads pair pair"], group: Any
) -> Float[Tensor, "batch heads pair value_dim"]:
    """Compute the state before this rank's tokens from each rank's own contribution and its transition matrix."""
    parts = _Gathered.apply(torch.cat((left, carry), dim=-1), group)
    sizes = (left.shape[-1], carry.shape[-1])
    state = parts[:0].sum(0)[..., : sizes[0]]  # zeros with a graph, so that every rank takes part in the backward
    for part in parts[: dist.get_rank(group)]:
        left, carry = part.split(sizes, dim=-1)
        state = carry @ state + left
    return state


def _continues(document_ids: Int[Tensor, "batch time"], group: Any) -> Tensor:
    """Mark the rows whose first token continues the last document of the previous rank."""
    ends = [torch.empty_like(document_ids[:, -1]) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ends, document_ids[:, -1].contiguous(), group=group)
    return document_ids[:, 0] == ends[dist.get_rank(group) - 1]  # irrelevant on the first rank, whose state is zero


class _Gathered(torch.autograd.Function):
    """All-gather whose backward sums each tensor's gradients over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None
