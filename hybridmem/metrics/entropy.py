"""Entropy of attention: the effective span of a head and the spread of a layer's allocation."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .mean import RunningMean


def entropy(probabilities: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead"]:
    """Entropy in nats along the last axis; zeros count as nothing."""
    return torch.special.entr(probabilities).sum(-1)


class EffectiveSpan(RunningMean):
    """exp(entropy) of the head-averaged attention, averaged over queries: 1 is one token, n an even spread over n."""

    def update(
        self, attention: Float[Tensor, "batch heads queries keys"], mask: Bool[Tensor, "batch queries"] | None = None
    ) -> None:
        """Add attention weights; `mask` says which queries count."""
        self.add(entropy(attention.double().mean(1)).exp(), mask)


class AllocationEntropy(RunningMean):
    """Entropy of the shares in nats, averaged over queries: 0 is one kind alone, ln 3 all three alike."""

    def update(self, shares: Float[Tensor, "batch queries kinds"], mask: Bool[Tensor, "batch queries"]) -> None:
        """Add shares, each row summing to 1; `mask` says which queries count."""
        self.add(entropy(shares.double()), mask)
