"""Effective span and allocation entropy of distributions with known values."""

import math

import pytest
import torch

from hybridmem.metrics import AllocationEntropy, EffectiveSpan, entropy


def test_even_and_pointed_attention():
    even, pointed = torch.full((1, 2, 1, 8), 1 / 8), torch.zeros(1, 2, 1, 8)
    pointed[..., 3] = 1
    metric = EffectiveSpan()
    metric.update(torch.cat((even, pointed), dim=2))
    torch.testing.assert_close(metric.compute().item(), (8 + 1) / 2)
    metric.reset()
    metric.update(torch.cat((even, pointed), dim=2), torch.tensor([[True, False]]))
    torch.testing.assert_close(metric.compute().item(), 8.0)


def test_heads_are_averaged_first():
    heads = torch.eye(2)[None, :, None]  # two heads, each on a different token
    metric = EffectiveSpan()
    metric.update(heads)
    torch.testing.assert_close(metric.compute().item(), 2.0)


def test_entropy_of_certainty_is_0_with_gradient():
    p = torch.tensor([1.0, 0.0], requires_grad=True)
    assert entropy(p).item() == 0


def test_one_kind_two_kinds_all_kinds():
    shares = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]]])
    metric = AllocationEntropy()
    metric.update(shares, torch.ones(1, 3, dtype=torch.bool))
    assert metric.compute().item() == pytest.approx((0 + math.log(2) + math.log(3)) / 3)
    metric.reset()
    metric.update(shares, torch.tensor([[False, True, False]]))
    assert metric.compute().item() == pytest.approx(math.log(2))
