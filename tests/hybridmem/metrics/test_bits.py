"""Bits per byte and loss by position, compared with values computed by hand."""

import math

import pytest
import torch

from hybridmem.metrics import BitsPerByte, LossByPosition, document_positions


def test_bits_per_byte():
    metric = BitsPerByte()
    metric.update(torch.tensor([math.log(2), 3 * math.log(2)]), torch.tensor([1, 3]))
    metric.update(torch.tensor([2 * math.log(2)]), torch.tensor([0]))  # a special token costs bits but has no bytes
    assert metric.compute().item() == pytest.approx(6 / 4)


def test_loss_by_position():
    metric = LossByPosition([0, 2, 4])
    nats = torch.arange(1.0, 7.0)[None] * math.log(2)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    metric.update(nats, torch.ones(1, 6, dtype=torch.long), positions)
    assert {name: round(value.item(), 6) for name, value in metric.compute().items()} == {
        "[0,2)": (1 + 2 + 5 + 6) / 4,
        "[2,4)": (3 + 4) / 2,
    }
    metric.update(nats, torch.ones(1, 6, dtype=torch.long), positions + 100)
    assert "[4,∞)" in metric.compute()


@pytest.mark.parametrize("edges", [[], [1, 2], [0, 2, 2]])
def test_edges_must_grow_from_0(edges):
    with pytest.raises(ValueError, match="must grow, starting with 0"):
        LossByPosition(edges)


def test_document_positions():
    ids = torch.tensor([[4, 4, 4, 9, 9, -1], [1, 2, 2, 2, 2, 2]])
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
