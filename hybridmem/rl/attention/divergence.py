"""Divergences between explicit attention distributions."""

from jaxtyping import Float
from torch import Tensor

from hybridmem_kernels.attention_divergence import FLOOR

from .distributions import Distribution

TINY = 1e-30


def divergence_of(p: Distribution, p_ref: Distribution, kind: str) -> Float[Tensor, "batch queries"]:
    """Return the divergence between rows in nats; rows of zeros have divergence 0."""
    if kind == "jsd":
        middle = 0.5 * (p + p_ref)
        return 0.5 * (_kl(p, middle, TINY) + _kl(p_ref, middle, TINY))
    return _kl(p_ref, p, FLOOR) if kind == "kl" else _kl(p, p_ref, FLOOR)


def _kl(p: Distribution, q: Distribution, floor: float) -> Float[Tensor, "batch queries"]:
    # log has an infinite gradient at 0; the clamp zeroes it at entries that contribute nothing.
    return (p * (p.clamp(min=TINY).log() - q.clamp(min=floor).log())).sum(-1)
