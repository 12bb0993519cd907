"""Divergences between attention distributions that are held as rows."""

from jaxtyping import Float
from torch import Tensor

from .distributions import Distribution

DIVERGENCES = ("jsd", "kl", "reverse_kl")
FLOOR = 1e-8  # of the probability that a KL divides by, as in the operator
TINY = 1e-30


def divergence_of(p: Distribution, p_ref: Distribution, kind: str) -> Float[Tensor, "batch queries"]:
    """A divergence between rows, in nats; rows of zeros have none."""
    if kind == "jsd":
        middle = 0.5 * (p + p_ref)
        return 0.5 * (_kl(p, middle, TINY) + _kl(p_ref, middle, TINY))
    return _kl(p_ref, p, FLOOR) if kind == "kl" else _kl(p, p_ref, FLOOR)


def _kl(p: Distribution, q: Distribution, floor: float) -> Float[Tensor, "batch queries"]:
    # The logarithm's gradient at 0 is infinite; its floor takes it away where p adds nothing.
    return (p * (p.clamp(min=TINY).log() - q.clamp(min=floor).log())).sum(-1)
