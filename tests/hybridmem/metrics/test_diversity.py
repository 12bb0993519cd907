"""Diversity of groups of responses, compared with values computed by hand."""

import math

import pytest
import torch

from hybridmem.metrics import AttentionDiversity, DistinctPatterns, jensen_shannon


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
    assert metric.compute().item() == pytest.approx(
        2 * math.log(2) / 6
    )  # two of three pairs differ, at one of two queries
    metric.update(attention[:2], torch.ones(2, 2, dtype=torch.bool))
    assert metric.compute().item() == pytest.approx(2 * math.log(2) / 8)  # another prompt's pair attends equally


def test_a_query_counts_where_both_responses_have_it():
    left, right = [1.0, 0.0], [0.0, 1.0]
    attention = torch.tensor([[left, left], [right, left]])
    metric = AttentionDiversity()
    metric.update(attention, torch.tensor([[True, True], [True, False]]))
    assert metric.compute().item() == pytest.approx(math.log(2))
    metric.reset()
    metric.update(attention, torch.tensor([[False, True], [True, False]]))
    assert math.isnan(metric.compute().item())


def rows(*places, keys=4):
    """Return one-query responses that each attend to a single key."""
    return torch.eye(keys)[list(places)][:, None]


def seen(responses):
    return torch.ones(responses, 1, dtype=torch.bool)


def test_clusters_are_counted():
    metric = DistinctPatterns()
    metric.update(rows(0, 0, 1, 0, 2), seen(5))
    assert metric.compute().item() == pytest.approx(3)
    metric.update(rows(3, 3), seen(2))
    assert metric.compute().item() == pytest.approx((3 + 1) / 2)


def test_a_chain_of_likes_is_one_cluster():
    """Neighbouring responses are similar, but the first and last are not."""
    shares = torch.linspace(0, 1, 7)
    attention = torch.stack((shares, 1 - shares), dim=-1)[:, None]
    steps = jensen_shannon(attention[:-1, 0], attention[1:, 0])
    assert steps.max() < 0.1 < jensen_shannon(attention[0, 0], attention[-1, 0])
    chained, parted = DistinctPatterns(0.1), DistinctPatterns(steps.min().item() / 2)
    for metric in (chained, parted):
        metric.update(attention, seen(7))
    assert chained.compute().item() == pytest.approx(1)
    assert parted.compute().item() == pytest.approx(7)


def test_responses_that_have_no_query_in_common_are_not_alike():
    metric = DistinctPatterns()
    metric.update(rows(0, 0).repeat(1, 2, 1), torch.tensor([[True, False], [False, True]]))
    assert metric.compute().item() == 2


def test_a_threshold_joins_some():
    with pytest.raises(ValueError, match=r"threshold=0\.7 must be at least 0 and below ln 2"):
        DistinctPatterns(0.7)
