"""How many tokens an attention distribution spreads over."""

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
