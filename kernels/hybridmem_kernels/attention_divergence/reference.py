"""Attention policies from full maps, the definition against which every other implementation is tested.

Reinforced Attention Learning (arXiv 2602.04884). With a_h,t the softmax weights of head h at position t and S_t the
earlier keys that t sees (its support),

    p_t(i) = mean_h a_h,t,i / mass_t     for i in S_t,      mass_t = sum_{i in S_t} mean_h a_h,t,i

and likewise p_ref for other queries and keys. 0 log 0 is 0.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..memory_scan.reference import state_dtype

DIVERGENCES = ("jsd", "kl", "reverse_kl")
FLOOR = 1e-8  # lower bound on the probabilities by which a KL divides


class AttentionPolicy(NamedTuple):
    """One policy: queries, keys preceded by persistent ones, and the settings of its scores."""

    q: Float[Tensor, "batch heads queries dim"]
    k: Float[Tensor, "batch kv_heads columns dim"]
    scale: float
    window: int | None
    num_persistent: int


class AttentionStats(NamedTuple):
    """Comparison of two attention policies per query; 0 if there is nothing to compare."""

    divergence: Float[Tensor, "batch queries"]
    entropy: Float[Tensor, "batch queries"]  # nats
    entropy_ref: Float[Tensor, "batch queries"]  # nats, without gradient
    mass: Float[Tensor, "batch queries"]  # the share of the attention on the support, in [0, 1]

    @property
    def jsd(self) -> Float[Tensor, "batch queries"]:
        """Return the divergence, which is a JSD by default."""
        return self.divergence


def attention_divergence_reference(
    policy: AttentionPolicy,
    policy_ref: AttentionPolicy,
    query_mask: Bool[Tensor, "batch queries"] | None,
    key_mask: Bool[Tensor, "batch keys"] | None,
    exclude_self: bool,
    divergence: str,
) -> AttentionStats:
    """Compute the stats from full maps; shapes as in `attention_divergence`."""
    dtype = state_dtype(policy.q.dtype)
    with torch.autocast(policy.q.device.type, enabled=False):
        p, mass = _distribution(policy, key_mask, exclude_self, dtype)
        p_ref, mass_ref = _distribution(policy_ref, key_mask, exclude_self, dtype)
        compared = _divergence(divergence, p, p_ref).where((mass > 0) & (mass_ref > 0), 0)
        stats = (compared, -(p * _log(p)).sum(-1), -(p_ref * _log(p_ref)).sum(-1), mass)
    return AttentionStats(*(x if query_mask is None else x.where(query_mask, 0) for x in stats))


def _distribution(
    policy: AttentionPolicy, key_mask: Bool[Tensor, "batch keys"] | None, exclude_self: bool, dtype: torch.dtype
) -> tuple[Float[Tensor, "batch queries keys"], Float[Tensor, "batch queries"]]:
    """Compute (p, mass)."""
    q, k = policy.q.to(dtype), policy.k.to(dtype)
    persistent, queries, keys = policy.num_persistent, q.shape[2], k.shape[2] - policy.num_persistent
    place = torch.arange(keys, device=q.device)
    distance = place[keys - queries :, None] - place
    visible = (distance >= 0) & (distance < (keys + 1 if policy.window is None else policy.window))
    if key_mask is not None:
        visible = visible & key_mask[:, None]
    support = visible & (distance >= int(exclude_self))
    seen = torch.cat((visible.new_ones(*visible.shape[:-1], persistent), visible), dim=-1)
    seen = seen.expand(len(q), -1, -1)[:, None]

    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * policy.scale
    weights = scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1).where(seen, 0)
    attention = weights.mean(1)[..., persistent:].where(support, 0)
    mass = attention.sum(-1)
    return attention / mass.where(mass > 0, 1).unsqueeze(-1), mass


def _log(p: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Compute the logarithm with value 0 at 0, where it is always multiplied by 0."""
    return p.where(p > 0, 1).log()


def _divergence(
    name: str, p: Float[Tensor, "batch queries keys"], p_ref: Float[Tensor, "batch queries keys"]
) -> Float[Tensor, "batch queries"]:
    if name == "kl":
        return (p_ref * (_log(p_ref) - p.clamp(min=FLOOR).log())).sum(-1)
    if name == "reverse_kl":
        return (p * (_log(p) - p_ref.clamp(min=FLOOR).log())).sum(-1)
    middle = _log((p + p_ref) / 2)
    return (p * (_log(p) - middle) + p_ref * (_log(p_ref) - middle)).sum(-1) / 2
