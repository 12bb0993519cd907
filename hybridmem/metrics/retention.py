"""How long a memory keeps what was written."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hybridmem.checks import at_least

from .float64 import Float64Metric


class RetentionHalfLife(Float64Metric):
    """Tokens until forgetting leaves half of a write, by head: ln 2 / −mean ln(1 − alpha).

    The mean is over tokens: forgetting is a product of 1 − alpha. A head that never forgets, alpha 0 throughout, has
    a half-life of inf; one that wipes everything at any token, alpha 1, has 0. Momentum, which goes on writing for a
    while, is left out.

    Args:
        num_heads: of the memory.

    Raises:
        ValueError: num_heads below 1.
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
        """Add forgetting gates in [0, 1]; `mask` says which tokens count."""
        mask = torch.ones_like(alpha[:, 0], dtype=torch.bool) if mask is None else mask
        log_kept = torch.log1p(-alpha.double()).masked_fill(~mask[:, None], 0)  # −inf · 0 would be nan
        self.log_kept += log_kept.sum((0, 2))
        self.tokens += mask.sum()

    def compute(self) -> Float[Tensor, " heads"]:
        """The half-life of each head in tokens; nan if no token counted. Of one head a number: torchmetrics does so."""
        return _half_life(self.log_kept / self.tokens)


def retention_half_life(alpha: Float[Tensor, "batch heads time"]) -> Float[Tensor, " heads"]:
    """`RetentionHalfLife` of these gates alone, in float64."""
    return _half_life(torch.log1p(-alpha.double()).mean((0, 2)))


def _half_life(mean_log_kept: Float[Tensor, " heads"]) -> Float[Tensor, " heads"]:
    return math.log(2) / mean_log_kept.abs()  # of −0 too, which would give −inf
