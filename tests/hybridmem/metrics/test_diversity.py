"""The diversity of a group of responses, by hand."""

import math

import pytest
import torch

from hybridmem.metrics import AttentionDiversity, jensen_shannon


def test_divergence_of_known_distributions():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    # The third: H(3/4, 1/4) - H(1/2, 1/2) / 2 = 2 ln 2 - 3/4 ln 3 - 1/2 ln 2.
    expected = [0.0, math.log(2), 1.5 * math.log(2) - 0.75 * math.log(3)]
    torch.testing.assert_close(jensen_shannon(p, q), torch.tensor(expected))
    torch.testing.assert_close(jensen_shannon(q, p), torch.tensor(expected))


def test_pairs_of_a_group():
    left, right = [1.0, 0.0], [0.0, 1.0]
    attention = torch.tensor([[left, left], [left, left], [right, left]])
    metric = AttentionDiversity()
    metric.update(attention, torch.ones(3, 2, dtype=torch.bool))
    assert metric.compute().item() == pytest.approx(2 * math.log(2) / 6)  # two of three pairs, at one query of two
    metric.update(attention[:2], torch.ones(2, 2, dtype=torch.bool))
    assert metric.compute().item() == pytest.approx(2 * math.log(2) / 8)  # another prompt's pair looks alike


def test_a_query_counts_where_both_responses_have_it():
    left, right = [1.0, 0.0], [0.0, 1.0]
    attention = torch.tensor([[left, left], [right, left]])
    metric = AttentionDiversity()
    metric.update(attention, torch.tensor([[True, True], [True, False]]))
    assert metric.compute().item() == pytest.approx(math.log(2))
    metric.reset()
    metric.update(attention, torch.tensor([[False, True], [True, False]]))
    assert math.isnan(metric.compute().item())
