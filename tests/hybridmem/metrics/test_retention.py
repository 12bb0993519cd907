"""Half-life of gates with a known decay."""

import math

import pytest
import torch

from hybridmem.metrics import RetentionHalfLife, retention_half_life


def test_a_write_has_faded_to_a_half_after_it():
    alpha = torch.tensor([0.01, 0.2, 0.5]).view(1, 3, 1).expand(2, 3, 7)
    for head, value in enumerate(retention_half_life(alpha).tolist()):
        assert (1 - alpha[0, head, 0].item()) ** value == pytest.approx(0.5)


def test_gates_multiply():
    """Factors 0.9 and 0.4 keep 0.36 after two tokens, as 0.6 does twice."""
    mixed = torch.tensor([[[0.1, 0.6]]], dtype=torch.float64)
    assert retention_half_life(mixed).item() == pytest.approx(math.log(0.5) / math.log(0.6))


def test_gates_at_their_ends():
    alpha = torch.zeros(1, 3, 4)
    alpha[0, 1, 2] = 1
    alpha[0, 2] = 0.5
    assert retention_half_life(alpha).tolist() == [math.inf, 0, 1]


def test_masked_tokens_count_for_nothing():
    alpha = torch.tensor([[[0.5, 0.5, 1.0]], [[0.75, 0.0, 1.0]]])
    metric = RetentionHalfLife(1)
    metric.update(alpha, torch.zeros(2, 3, dtype=torch.bool))
    assert metric.compute().isnan().all()
    metric.update(alpha, torch.tensor([[True, True, False], [False, False, False]]))
    assert metric.compute().item() == 1
    metric.update(alpha, torch.tensor([[False, False, False], [True, False, False]]))
    assert metric.compute().item() == pytest.approx(math.log(2) / (4 * math.log(2) / 3))  # halves: 1, 1, 2 in 3 tokens


def test_a_memory_has_heads():
    with pytest.raises(ValueError, match="num_heads must be at least 1"):
        RetentionHalfLife(0)
