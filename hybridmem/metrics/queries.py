"""What every query of an attention distribution is measured by, averaged over the queries that count."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric


class QueryMean(Metric):
    """A mean over queries; what is measured of each is up to the metrics that are built on it."""

    full_state_update = False
    total: Tensor
    queries: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("queries", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Float[Tensor, "batch queries"], mask: Bool[Tensor, "batch queries"] | None) -> None:
        """Add a value per query; `mask` says which queries count, None that all do."""
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        self.total += values.double().masked_fill(~mask, 0).sum()
        self.queries += mask.sum()

    def compute(self) -> Float[Tensor, ""]:
        """The mean over queries; nan if none counted."""
        return self.total / self.queries
