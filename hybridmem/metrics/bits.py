"""Bits per byte, overall and by position in the document."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .float64 import Float64Metric
from .mean import RunningMean


class BitsPerByte(Float64Metric):
    """Negative log-likelihood in bits, divided by the number of bytes that the predicted tokens represent.

    It is independent of the tokenizer; 8 means no compression.
    """

    full_state_update = False
    nats: Tensor
    bytes: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Float[Tensor, " *shape"], num_bytes: Int[Tensor, " *shape"]) -> None:
        """Add predicted tokens, with the negative log-likelihood and the number of bytes of each token."""
        self.nats += nats.double().sum()
        self.bytes += num_bytes.double().sum()

    def compute(self) -> Float[Tensor, ""]:
        """Return bits per byte, or NaN before the first byte."""
        return self.nats / self.bytes / math.log(2)


class NatsPerToken(RunningMean):
    """Negative log-likelihood per predicted token in nats; NaN before the first token."""

    def update(self, nats: Float[Tensor, " *shape"]) -> None:
        """Add the negative log-likelihoods of predicted tokens."""
        self.add(nats)


class LossByPosition(Float64Metric):
    """Bits per byte of tokens whose document position lies in [edges[i], edges[i+1]); the last range is unbounded.

    Args:
        edges: increasing starts of the ranges, beginning with 0.

    Raises:
        ValueError: the edges do not increase from 0.
    """

    full_state_update = False
    nats: Tensor
    bytes: Tensor

    def __init__(self, edges: Sequence[int], **kwargs: Any):
        super().__init__(**kwargs)
        if not edges or edges[0] != 0 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"edges={list(edges)} must grow, starting with 0")
        self.edges = list(edges)
        self.add_state("nats", torch.zeros(len(edges), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros(len(edges), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, nats: Float[Tensor, "*shape"], num_bytes: Int[Tensor, "*shape"], positions: Int[Tensor, "*shape"]
    ) -> None:
        """Add predicted tokens, each with the number of earlier tokens in its document."""
        inner = torch.tensor(self.edges[1:], device=positions.device)
        bucket = torch.bucketize(positions.flatten(), inner, right=True)
        self.nats.index_add_(0, bucket, nats.flatten().double())
        self.bytes.index_add_(0, bucket, num_bytes.flatten().double())

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return bits per byte by range, named as intervals, without empty ranges."""
        bits = self.nats / self.bytes / math.log(2)
        names = [f"[{low},{high})" for low, high in zip(self.edges, [*self.edges[1:], "∞"], strict=True)]
        return {name: value for name, value, seen in zip(names, bits, self.bytes, strict=True) if seen > 0}


def document_positions(document_ids: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Count, for each token, the earlier tokens of its document in its row."""
    time = torch.arange(document_ids.shape[1], device=document_ids.device)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return time - torch.where(starts, time, 0).cummax(dim=1).values
