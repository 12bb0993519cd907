"""How many tokens an attention distribution spreads over."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric


def entropy(probabilities: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead"]:
    """Entropy in nats along the last axis; zeros count as nothing."""
    return torch.special.entr(probabilities).sum(-1)


class EffectiveSpan(Metric):
    """exp(entropy) of the head-averaged attention, averaged over queries: 1 is one token, n an even spread over n."""

    full_state_update = False
    spans: Tensor
    queries: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("spans", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, attention: Float[Tensor, "batch heads queries keys"], mask: Bool[Tensor, "batch queries"] | None = None
    ) -> None:
        """Add attention weights; `mask` says which queries count."""
        spans = entropy(attention.double().mean(1)).exp()
        weight = torch.ones_like(spans) if mask is None else mask.double()
        self.spans += (spans * weight).sum()
        self.queries += weight.sum()

    def compute(self) -> Float[Tensor, ""]:
        """The mean span in tokens."""
        return self.spans / self.queries
