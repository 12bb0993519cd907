"""One token of the linear memory by the recurrence itself: decoding without chunks."""

import torch
from jaxtyping import Float
from torch import Tensor

from .reference import MemoryState


def memory_step(
    q: Float[Tensor, "batch heads 1 key_dim"],
    k: Float[Tensor, "batch heads 1 key_dim"],
    v: Float[Tensor, "batch heads 1 value_dim"],
    alpha: Float[Tensor, "batch heads 1"],
    eta: Float[Tensor, "batch heads 1"],
    theta: Float[Tensor, "batch heads 1"],
    state: MemoryState,
    in_place: bool = False,
) -> tuple[Float[Tensor, "batch heads 1 value_dim"], MemoryState]:
    """Return (out, state) of one token, equations (1) to (3) of README.md, without gradients.

    Args:
        q, k, v, alpha, eta, theta, state: as in `memory_scan`; the token continues the state's document.
        in_place: write the new state over the given one, which must be contiguous.
    """
    dtype, shape = state.weight.dtype, v.shape
    weight, momentum = (x.flatten(0, 1) for x in state)
    query, key, value = (x.to(dtype).flatten(0, 1) for x in (q, k, v))
    keep, eta, theta = (gate.to(dtype).reshape(-1, 1, 1) for gate in (1 - alpha, eta, theta))
    error = torch.baddbmm(value, key, weight, beta=-1)
    momentum = momentum.mul_(eta) if in_place else momentum * eta
    momentum.addcmul_((key * theta).mT, error, value=-1)
    weight = torch.addcmul(momentum, weight, keep, out=weight if in_place else None)
    out = torch.bmm(query, weight).view(shape).to(v.dtype)
    return out, state if in_place else MemoryState(
        *(x.view_as(y) for x, y in zip((weight, momentum), state, strict=True))
    )
