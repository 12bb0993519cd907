"""Needles count only if all of their tokens are predicted."""

import torch

from hybridmem.metrics import NeedleAccuracy


def test_needle_accuracy():
    labels = torch.tensor([[-100, 1, 2], [-100, 1, 2], [-100, -100, -100]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2], [2, 1, 0], [0, 0, 0]]), 3).float()
    metric = NeedleAccuracy()
    metric.update(logits, labels)
    assert metric.compute().item() == 0.5  # the row without an answer does not count
