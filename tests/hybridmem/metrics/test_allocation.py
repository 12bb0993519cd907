"""The entropy of allocations whose entropy is known."""

import math

import pytest
import torch

from hybridmem.metrics import AllocationEntropy


def test_one_kind_two_kinds_all_kinds():
    shares = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]]])
    metric = AllocationEntropy()
    metric.update(shares, torch.ones(1, 3, dtype=torch.bool))
    assert metric.compute().item() == pytest.approx((0 + math.log(2) + math.log(3)) / 3)
    metric.reset()
    metric.update(shares, torch.tensor([[False, True, False]]))
    assert metric.compute().item() == pytest.approx(math.log(2))
