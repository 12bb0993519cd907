"""Entropies and divergences of distributions over the keys of one tile, and their derivatives."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .reference import FLOOR


def align(p: Tensor, p_ref: Tensor) -> tuple[Tensor, Tensor]:
    """Left-pad the shorter of two bands with zeros; both end at the same key."""
    short = p.shape[-1] - p_ref.shape[-1]
    if short == 0:
        return p, p_ref
    return F.pad(p, (max(0, -short), 0)), F.pad(p_ref, (max(0, short), 0))


def log_sum(scores: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """Compute log2 of the sum of powers of 2; the result is -inf for an empty sum."""
    if not scores.shape[dim]:
        return scores.sum(dim).log2_()
    top = scores.amax(dim, keepdim=True)
    top = top.where(top.isfinite(), 0)  # if nothing is visible, the result is -inf, not nan
    return (scores - top).exp2_().sum(dim).log2_() + top.squeeze(dim)


def finite_log(p: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Compute the logarithm with a finite value at 0, where it is always multiplied by 0."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log_()


def entropy_of(p: Float[Tensor, "parts batch run span"]) -> Float[Tensor, "parts batch run"]:
    """Compute the entropy in nats."""
    return -torch.linalg.vecdot(p, finite_log(p))


def divergence_of(
    name: str, p: Float[Tensor, "parts batch run span"], p_ref: Float[Tensor, "parts batch run span"]
) -> Float[Tensor, "parts batch run"]:
    """Compute the divergence called `name` in nats."""
    if name == "kl":
        return torch.linalg.vecdot(p_ref, finite_log(p_ref) - p.clamp(min=FLOOR).log_())
    if name == "reverse_kl":
        return torch.linalg.vecdot(p, finite_log(p) - p_ref.clamp(min=FLOOR).log_())
    # In terms of d = (p - p_ref) / (p + p_ref), every term is about d². This avoids small differences of large numbers
    # for similar policies, which are the rule in training.
    total, difference = p + p_ref, p - p_ref
    d = difference.div_(total.clamp(min=torch.finfo(p.dtype).tiny))
    edge = 1 - torch.finfo(p.dtype).eps  # at ±1 the factor of the logarithm is 0
    inner = d.clamp(-edge, edge)
    terms = torch.log1p(inner).mul_(1 + d).add_(torch.log1p(-inner).mul_(1 - d))
    return torch.linalg.vecdot(total, terms) / 4


def divergence_slope(
    name: str, p: Float[Tensor, "parts batch run span"], p_ref: Float[Tensor, "parts batch run span"]
) -> Float[Tensor, "parts batch run span"]:
    """Compute the derivative with respect to p up to a constant per query, which cancels because p sums to 1."""
    if name == "kl":
        return (p_ref / p.clamp(min=FLOOR)).where(p >= FLOOR, 0).neg_()
    if name == "reverse_kl":
        return finite_log(p) - p_ref.clamp(min=FLOOR).log_()
    tiny = torch.finfo(p.dtype).tiny
    return finite_log(2 * p / (p + p_ref).clamp_(min=tiny)).mul_(0.5)
