"""Diversity of the attention of several responses to one prompt."""

import math
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .entropy import entropy
from .mean import RunningMean


def jensen_shannon(p: Float[Tensor, "*lead keys"], q: Float[Tensor, "*lead keys"]) -> Float[Tensor, "*lead"]:
    """Compute JSD(p ‖ q) = H((p + q) / 2) - (H(p) + H(q)) / 2 over the last axis in nats, in [0, ln 2]."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def check_threshold(**settings: float) -> None:
    """Raise a ValueError for thresholds that would join no responses, or all of them."""
    for name, value in settings.items():
        if not 0 <= value < math.log(2):
            raise ValueError(f"{name}={value} must be at least 0 and below ln 2, the JSD of disjoint attention")


class AttentionDiversity(RunningMean):
    """Mean JSD in nats over pairs of a prompt's responses, token by token; 0 if all have the same attention."""

    def update(
        self, attention: Float[Tensor, "responses queries keys"], mask: Bool[Tensor, "responses queries"]
    ) -> None:
        """Add one prompt's responses; pairs are compared at queries that `mask` selects in both responses."""
        attention = attention.double()
        for a, b in combinations(range(len(attention)), 2):
            self.add(jensen_shannon(attention[a], attention[b]), mask[a] & mask[b])


class DistinctPatterns(RunningMean):
    """Number of distinct attention patterns of a prompt's responses, counted as clusters and averaged over prompts.

    Two responses belong to one cluster if their mean JSD over common tokens is at most `threshold`, or if a chain of
    such pairs connects them (single linkage). 1 means that all responses of a prompt have similar attention.

    Args:
        threshold: JSD in nats, below ln 2.

    Raises:
        ValueError: the threshold would join no responses, or all of them.
    """

    def __init__(self, threshold: float = 0.1, **kwargs: Any):
        super().__init__(**kwargs)
        check_threshold(threshold=threshold)
        self.threshold = threshold

    def update(
        self, attention: Float[Tensor, "responses queries keys"], mask: Bool[Tensor, "responses queries"]
    ) -> None:
        """Add one prompt's responses; pairs are compared at queries that `mask` selects in both responses."""
        attention = attention.double()
        joined = torch.eye(len(attention), dtype=torch.float64, device=attention.device)
        for a, b in combinations(range(len(attention)), 2):
            both = mask[a] & mask[b]
            if both.any() and jensen_shannon(attention[a], attention[b])[both].mean() <= self.threshold:
                joined[a, b] = joined[b, a] = 1
        for _ in range(len(attention)):  # extend pairs to chains
            joined = (joined @ joined).clamp(max=1)
        self.add((1 / joined.sum(1)).sum())  # each response counts as its share of its cluster
