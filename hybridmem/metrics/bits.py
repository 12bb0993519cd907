"""Bits per byte, overall and by how much of the document was read before."""

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
    """Negative log-likelihood in bits over the bytes that the predicted tokens stand for.

    It does not depend on the tokenizer: 8 is no compression at all.
    """

    full_state_update = False
    nats: Tensor
    bytes: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bytes", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Float[Tensor, " *shape"], num_bytes: Int[Tensor, " *shape"]) -> None:
        """Add predicted tokens: each one's negative log-likelihood and how many bytes it stands for."""
        self.nats += nats.double().sum()
        self.bytes += num_bytes.double().sum()

    def compute(self) -> Float[Tensor, ""]:
        """Bits per byte; NaN before any byte was seen."""
        return self.nats / self.bytes / math.log(2)


class NatsPerToken(RunningMean):
    """Negative log-likelihood per predicted token, in nats; nan before any token was seen."""

    def update(self, nats: Float[Tensor, " *shape"]) -> None:
        """Add predicted tokens' negative log-likelihoods."""
        self.add(nats)


class LossByPosition(Float64Metric):
    """Bits per byte of tokens whose document position lies in [edges[i], edges[i+1]), the last range being open.

    Args:
        edges: where the ranges begin, growing from 0.

    Raises:
        ValueError: edges that do not grow from 0.
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
        """Add predicted tokens, each with the number of its document's tokens that were read before it."""
        inner = torch.tensor(self.edges[1:], device=positions.device)
        bucket = torch.bucketize(positions.flatten(), inner, right=True)
        self.nats.index_add_(0, bucket, nats.flatten().double())
        self.bytes.index_add_(0, bucket, num_bytes.flatten().double())

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Bits per byte by range, named as intervals; ranges without a byte are left out."""
        bits = self.nats / self.bytes / math.log(2)
        names = [f"[{low},{high})" for low, high in zip(self.edges, [*self.edges[1:], "∞"], strict=True)]
        return {name: value for name, value, seen in zip(names, bits, self.bytes, strict=True) if seen > 0}


def document_positions(document_ids: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """How many tokens of its document stand before each token in its row."""
    time = torch.arange(document_ids.shape[1], device=document_ids.device)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return time - torch.where(starts, time, 0).cummax(dim=1).values
