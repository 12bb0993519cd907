"""Mean accumulated over batches and processes."""

from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from .float64 import Float64Metric


class RunningMean(Float64Metric):
    """Mean of values, as a base for other metrics."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None) -> None:
        """Add values; `mask` selects values, None all of them."""
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        self.total += values.double().masked_fill(~mask, 0).sum().to(self.total.device)
        self.count += mask.sum().to(self.count.device)

    def compute(self) -> Shaped[Tensor, ""]:
        """Return the mean, or NaN without values."""
        return self.total / self.count
