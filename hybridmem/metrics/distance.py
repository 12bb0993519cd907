"""How far back attention goes."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hybridmem.checks import at_least

from .mean import RunningMean


def distances(attention: Float[Tensor, "batch queries keys"]) -> Int[Tensor, "queries keys"]:
    """How many tokens each key lies before each query, where the queries are the last ones of the keys' text."""
    queries, keys = attention.shape[1:]
    clock = torch.arange(keys, device=attention.device)
    return clock[keys - queries :, None] - clock


class MeanDistance(RunningMean):
    """Σ_i p_t(i) · (t − i) in tokens, averaged over queries: 1 is the token before."""

    def update(
        self, attention: Float[Tensor, "batch queries keys"], mask: Bool[Tensor, "batch queries"] | None = None
    ) -> None:
        """Add distributions over all tokens, of the last `queries` of them; `mask` says which queries count.

        A query that has no earlier token, a row of zeros, should not.
        """
        away = distances(attention)
        self.add((attention.double() * away).sum(-1), mask)


class BeyondWindow(RunningMean):
    """The share of attention on tokens that lie `window` or more back, where window attention cannot see.

    Args:
        window: tokens that a query sees, itself among them, as in `attention_window`.

    Raises:
        ValueError: a window below 1.
    """

    def __init__(self, window: int, **kwargs: Any):
        super().__init__(**kwargs)
        at_least(1, window=window)
        self.window = window

    def update(
        self, attention: Float[Tensor, "batch queries keys"], mask: Bool[Tensor, "batch queries"] | None = None
    ) -> None:
        """Add distributions over all tokens, of the last `queries` of them; `mask` says which queries count.

        A query that has no earlier token, a row of zeros, should not.
        """
        beyond = distances(attention) >= self.window
        self.add((attention.double() * beyond).sum(-1), mask)
