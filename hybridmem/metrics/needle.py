"""Accuracy of needle-in-a-haystack retrieval."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class NeedleAccuracy(Metric):
    """Share of rows in which every answer token is the most likely one, as in greedy decoding."""

    full_state_update = False
    right: Tensor
    rows: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("right", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "batch time vocab"], shift_labels: Int[Tensor, "batch time"]) -> None:
        """Add rows; labels are -100 everywhere except at the answer."""
        answer = shift_labels != -100
        hits = (logits.argmax(-1) == shift_labels) | ~answer
        self.right += (hits.all(1) & answer.any(1)).sum()
        self.rows += answer.any(1).sum()

    def compute(self) -> Float[Tensor, ""]:
        """Return the share in [0, 1]."""
        return self.right / self.rows
