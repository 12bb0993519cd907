"""Attention distances for known attention patterns."""

import pytest
import torch

from hybridmem.metrics import BeyondWindow, MeanDistance

# Two queries: the last two of four tokens.
ATTENTION = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.25, 0.0, 0.75, 0.0]]])


def test_mean_distance():
    metric = MeanDistance()
    metric.update(ATTENTION)
    assert metric.compute().item() == pytest.approx(((0.5 * 2 + 0.5 * 1) + (0.25 * 3 + 0.75 * 1)) / 2)
    metric.reset()
    metric.update(ATTENTION, torch.tensor([[False, True]]))
    assert metric.compute().item() == pytest.approx(1.5)


def test_beyond_the_window():
    for window, expected in ((1, 1.0), (2, (0.5 + 0.25) / 2), (3, (0 + 0.25) / 2), (4, 0.0)):
        metric = BeyondWindow(window)
        metric.update(ATTENTION)
        assert metric.compute().item() == pytest.approx(expected), window


def test_window_attention_stays_within_its_window():
    """Window attention over `window` tokens, the query included, has no mass beyond the window."""
    window, time = 3, 8
    away = torch.arange(time)[:, None] - torch.arange(time)
    seen = ((away >= 0) & (away < window)).double()
    attention = (seen / seen.sum(-1, keepdim=True))[None]
    metric, narrower = BeyondWindow(window), BeyondWindow(window - 1)
    metric.update(attention)
    narrower.update(attention)
    assert metric.compute() == 0
    assert narrower.compute() > 0


def test_masked_rows_are_ignored():
    rows = torch.cat((ATTENTION, torch.full((1, 2, 4), torch.nan)))
    mask = torch.tensor([[True, True], [False, False]])
    metric = MeanDistance()
    metric.update(rows, mask)
    assert metric.compute().item() == pytest.approx(1.5)
    empty = BeyondWindow(2)
    empty.update(rows, torch.zeros_like(mask))
    assert empty.compute().isnan()


def test_a_window_has_a_token():
    with pytest.raises(ValueError, match="window must be at least 1"):
        BeyondWindow(0)
