"""Retention of a memory's writes."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hybridmem.checks import at_least

from .float64 import Float64Metric


class RetentionHalfLife(Float64Metric):
    """Half-life of a write in tokens, by head: ln 2 / −mean ln(1 − alpha).

    The mean is over tokens, because forgetting multiplies by 1 − alpha at each token. A head that never forgets (alpha
    is always 0) has a half-life of inf; a head that erases everything at any token (alpha is 1) has 0. The momentum,
    which prolongs writes, is ignored.

    Args:
        num_heads: number of heads of the memory.

    Raises:
        ValueError: num_heads is below 1.
    """

    full_state_update = False
    log_kept: Tensor
    tokens: Tensor

    def __init__(self, num_heads: int, **kwargs: Any):
        super().__init__(**kwargs)
        at_least(1, num_heads=num_heads)
        self.add_state("log_kept", torch.zeros(num_heads, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, alpha: Float[Tensor, "batch heads time"], mask: Bool[Tensor, "batch time"] | None = None) -> None:
        """Add forgetting gates in [0, 1]; `mask` selects tokens."""
        mask = torch.ones_like(alpha[:, 0], dtype=torch.bool) if mask is None else mask
        log_kept = torch.log1p(-alpha.double()).masked_fill(~mask[:, None], 0)  # −inf · 0 would be NaN
        self.log_kept += log_kept.sum((0, 2))
        self.tokens += mask.sum()

    def compute(self) -> Float[Tensor, " heads"]:
        """Return the half-life of each head in tokens, or NaN without tokens; torchmetrics squeezes a single head."""
        return _half_life(self.log_kept / self.tokens)


def retention_half_life(alpha: Float[Tensor, "batch heads time"]) -> Float[Tensor, " heads"]:
    """Compute `RetentionHalfLife` of the given gates in float64."""
    return _half_life(torch.log1p(-alpha.double()).mean((0, 2)))


def _half_life(mean_log_kept: Float[Tensor, " heads"]) -> Float[Tensor, " heads"]:
    return math.log(2) / mean_log_kept.abs()  # −0 would give −inf
