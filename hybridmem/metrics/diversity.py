"""How differently the responses to one prompt look back."""

import math
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .entropy import entropy
from .mean import RunningMean


def jensen_shannon(p: Float[Tensor, "*lead keys"], q: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead"]:
    """JSD(p ‖ q) = H((p + q) / 2) - (H(p) + H(q)) / 2 along the last axis, in nats: 0 if equal, ln 2 if disjoint."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def check_threshold(**settings: float) -> None:
    """Refuse divergences that join no two responses, or all."""
    for name, value in settings.items():
        if not 0 <= value < math.log(2):
            raise ValueError(f"{name}={value} must be at least 0 and below ln 2, the JSD of disjoint attention")


class AttentionDiversity(RunningMean):
    """Mean JSD in nats over the pairs of a prompt's responses, token by token: 0 when all of them look alike."""

    def update(
        self, attention: Float[Tensor, "responses queries keys"], mask: Bool[Tensor, "responses queries"]
    ) -> None:
        """Add one prompt's responses; a pair counts at the queries that `mask` gives to both."""
        attention = attention.double()
        for a, b in combinations(range(len(attention)), 2):
            self.add(jensen_shannon(attention[a], attention[b]), mask[a] & mask[b])


class DistinctPatterns(RunningMean):
    """How many ways of looking back a prompt's responses have: the clusters of their attention, averaged over prompts.

    Two responses are of one cluster if their mean JSD over the tokens of both is at most `threshold`, or if a chain of
    such pairs joins them (single linkage). 1 is a prompt whose responses all look alike.

    Args:
        threshold: in nats, below ln 2.

    Raises:
        ValueError: a threshold that joins none or all.
    """

    def __init__(self, threshold: float = 0.1, **kwargs: Any):
        super().__init__(**kwargs)
        check_threshold(threshold=threshold)
        self.threshold = threshold

    def update(
        self, attention: Float[Tensor, "responses queries keys"], mask: Bool[Tensor, "responses queries"]
    ) -> None:
        """Add one prompt's responses; a pair is compared at the queries that `mask` gives to both."""
        attention = attention.double()
        joined = torch.eye(len(attention), dtype=torch.float64, device=attention.device)
        for a, b in combinations(range(len(attention)), 2):
            both = mask[a] & mask[b]
            if both.any() and jensen_shannon(attention[a], attention[b])[both].mean() <= self.threshold:
                joined[a, b] = joined[b, a] = 1
        for _ in range(len(attention)):  # pairs become chains
            joined = (joined @ joined).clamp(max=1)
        self.add((1 / joined.sum(1)).sum())  # each response counts as its share of its cluster
