"""A mean that adds up over batches and processes."""

from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from .float64 import Float64Metric


class RunningMean(Float64Metric):
    """A mean of values; what is measured is up to the metrics that are built on it."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, values: Shaped[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None) -> None:
        """Add values; `mask` says which count, None that all do."""
        mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
        self.total += values.double().masked_fill(~mask, 0).sum().to(self.total.device)
        self.count += mask.sum().to(self.count.device)

    def compute(self) -> Shaped[Tensor, ""]:
        """The mean; nan if nothing counted."""
        return self.total / self.count
