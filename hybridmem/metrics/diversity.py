"""How differently the responses to one prompt look back."""

from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from .span import entropy


def jensen_shannon(p: Float[Tensor, "*lead keys"], q: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead"]:
    """JSD(p ‖ q) = H((p + q) / 2) - (H(p) + H(q)) / 2 along the last axis, in nats: 0 if equal, ln 2 if disjoint."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


class AttentionDiversity(Metric):
    """Mean JSD in nats over the pairs of a prompt's responses, token by token: 0 when all of them look alike."""

    full_state_update = False
    divergence: Tensor
    pairs: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("divergence", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, attention: Float[Tensor, "responses queries keys"], mask: Bool[Tensor, "responses queries"]
    ) -> None:
        """Add one prompt's responses; a pair counts at the queries that `mask` gives to both."""
        attention = attention.double()
        for a, b in combinations(range(len(attention)), 2):
            both = mask[a] & mask[b]
            self.divergence += (jensen_shannon(attention[a], attention[b]) * both).sum()
            self.pairs += both.sum()

    def compute(self) -> Float[Tensor, ""]:
        """The mean over pairs and queries; nan if no pair counted."""
        return self.divergence / self.pairs
