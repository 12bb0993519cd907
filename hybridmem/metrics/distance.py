"""Attention distance."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hybridmem.checks import at_least

from .mean import RunningMean


def distances(attention: Float[Tensor, "batch queries keys"]) -> Int[Tensor, "queries keys"]:
    """Return the distance in tokens from each query back to each key; the queries are the last tokens of the text."""
    queries, keys = attention.shape[1:]
    clock = torch.arange(keys, device=attention.device)
    return clock[keys - queries :, None] - clock


class MeanDistance(RunningMean):
    """Mean attention distance Σ_i p_t(i) · (t − i) in tokens, averaged over queries; 1 is the previous token."""

    def update(
        self, attention: Float[Tensor, "batch queries keys"], mask: Bool[Tensor, "batch queries"] | None = None
    ) -> None:
        """Add the distributions of the last `queries` tokens over all tokens; `mask` selects queries.

        Mask out queries without earlier tokens, whose distributions are rows of zeros.
        """
        away = distances(attention)
        self.add((attention.double() * away).sum(-1), mask)


class BeyondWindow(RunningMean):
    """Share of attention on tokens at a distance of `window` or more, outside the reach of window attention.

    Args:
        window: number of tokens that a query sees, itself included, as in `attention_window`.

    Raises:
        ValueError: the window is below 1.
    """

    def __init__(self, window: int, **kwargs: Any):
        super().__init__(**kwargs)
        at_least(1, window=window)
        self.window = window

    def update(
        self, attention: Float[Tensor, "batch queries keys"], mask: Bool[Tensor, "batch queries"] | None = None
    ) -> None:
        """Add the distributions of the last `queries` tokens over all tokens; `mask` selects queries.

        Mask out queries without earlier tokens, whose distributions are rows of zeros.
        """
        beyond = distances(attention) >= self.window
        self.add((attention.double() * beyond).sum(-1), mask)
