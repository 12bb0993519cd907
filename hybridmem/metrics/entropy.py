"""Entropy of attention: effective span of heads, and spread of a layer's allocation."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .mean import RunningMean


def entropy(probabilities: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead"]:
    """Compute the entropy in nats over the last axis, with 0 log 0 = 0."""
    return torch.special.entr(probabilities).sum(-1)


class EffectiveSpan(RunningMean):
    """Mean exp(entropy) of the head-averaged attention over queries: 1 is a single token, n an even spread over n."""

    def update(
        self, attention: Float[Tensor, "batch heads queries keys"], mask: Bool[Tensor, "batch queries"] | None = None
    ) -> None:
        """Add attention weights; `mask` selects queries."""
        self.add(entropy(attention.double().mean(1)).exp(), mask)


class AllocationEntropy(RunningMean):
    """Mean entropy of allocation shares over queries in nats: 0 for a single kind, ln 3 for three equal shares."""

    def update(self, shares: Float[Tensor, "batch queries kinds"], mask: Bool[Tensor, "batch queries"]) -> None:
        """Add shares, with rows that sum to 1; `mask` selects queries."""
        self.add(entropy(shares.double()), mask)
