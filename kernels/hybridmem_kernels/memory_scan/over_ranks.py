"""The linear memory along a sequence that is split over ranks, all of which scan at once.

The recurrence is affine in its start: with z = [W; S] a rank's tokens make z' = T z + b and o_t = A_t z + c_t.
T and A_t do not depend on values. One scan gives all four: of the values beside zeros, from a state of zeros beside
the identity. So no rank waits for another to scan. Then every rank tells the others its T and b, 6 dim² numbers a head
for keys and values of dim channels, puts together what those before it leave, and adds A_t z. The scan is three times
as wide for it.
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
    """Read and write a linear memory along a sequence of which each rank of a group holds a part, in order.

    Args:
        q, k, v, alpha, eta, theta, chunk_size, document_ids: as in `memory_scan`, of this rank's tokens, at least one.
            Every rank gives document_ids, or none.
        group: the ranks; None: all.

    Returns:
        out of this rank's tokens, and the state after them, as `memory_scan` gives them for the whole sequence.
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
    """The state that the ranks before this one leave, from what each leaves by itself and how it carries a state on."""
    parts = _Gathered.apply(torch.cat((left, carry), dim=-1), group)
    sizes = (left.shape[-1], carry.shape[-1])
    state = parts[:0].sum(0)[..., : sizes[0]]  # zeros, but with gradients: the backward gathers on every rank
    for part in parts[: dist.get_rank(group)]:
        left, carry = part.split(sizes, dim=-1)
        state = carry @ state + left
    return state


def _continues(document_ids: Int[Tensor, "batch time"], group: Any) -> Tensor:
    """Rows whose first token goes on with the document that the rank before ended in."""
    ends = [torch.empty_like(document_ids[:, -1]) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ends, document_ids[:, -1].contiguous(), group=group)
    return document_ids[:, 0] == ends[dist.get_rank(group) - 1]  # the first rank has nothing to go on with


class _Gathered(torch.autograd.Function):
    """Every rank's tensor; the gradient of one is the sum of what all ranks make of it."""

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
