"""How evenly a layer shares its reading among persistent tokens, memory and window."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from .span import entropy


class AllocationEntropy(Metric):
    """Entropy of the shares in nats, averaged over queries: 0 is one kind alone, ln 3 all three alike."""

    full_state_update = False
    entropies: Tensor
    queries: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("entropies", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, shares: Float[Tensor, "batch queries kinds"], mask: Bool[Tensor, "batch queries"]) -> None:
        """Add shares, each row summing to 1; `mask` says which queries count."""
        self.entropies += (entropy(shares.double()) * mask).sum()
        self.queries += mask.sum()

    def compute(self) -> Float[Tensor, ""]:
        """The mean entropy; nan if no query counted."""
        return self.entropies / self.queries
