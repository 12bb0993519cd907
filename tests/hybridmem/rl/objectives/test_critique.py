"""Critique-GRPO, compared with values computed by hand."""

import math

import pytest
import torch

from hybridmem.rl import CritiqueGRPO, CritiqueGRPOReleased, DrGRPO, IndicativeCritic
from hybridmem.rl.objectives.critique import shaped

CRITIC = IndicativeCritic()


def test_advantages_are_over_the_union():
    """Three failures and a right refinement have mean ¼; a group of three with one right response has mean ⅓."""
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    advantages = CritiqueGRPO(critic=CRITIC).advantages(rewards, torch.tensor([4, 3]), 3)
    assert advantages.tolist() == pytest.approx([-0.25, -0.25, -0.25, 0.75, 2 / 3, -1 / 3, -1 / 3])


def test_the_released_code_divides_by_the_deviation():
    """The standard deviation of (1, 0, 0) with n − 1 is √⅓."""
    advantages = CritiqueGRPOReleased(critic=CRITIC).advantages(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([3]), 2)
    scale = math.sqrt(1 / 3) + 1e-4
    assert advantages.tolist() == pytest.approx([2 / 3 / scale, -1 / 3 / scale, -1 / 3 / scale], rel=1e-5)


def test_shaping_and_where_its_gradient_peaks():
    """ρ = π / (π + γ) is ½ at π = γ, and the weight of ∇ log π, γπ / (π + γ)², is ¼ there and less elsewhere."""
    probabilities = torch.tensor([[0.01, 0.05, 0.1, 0.2, 0.9]], dtype=torch.float64)
    logps = probabilities.log().requires_grad_()
    rho = shaped(logps, 0.1)
    rho.sum().backward()
    assert rho.tolist()[0] == pytest.approx([1 / 11, 1 / 3, 1 / 2, 2 / 3, 0.9])
    assert logps.grad.tolist()[0] == pytest.approx([0.001 / 0.0121, 2 / 9, 0.25, 2 / 9, 0.09])


def test_loss_of_initial_and_refined_tokens():
    """One initial response (r = 1.5, 1) with A = −1, one refinement (π = 0.1, 0.4) with A = 2; γ = 0.1.

    The token losses are −min(−1.5, −1.2) and 1 for the first response, and −2 · ½ and −2 · 0.8 for the second.
    """
    old = torch.log(torch.tensor([[0.2, 0.2], [0.7, 0.7]], dtype=torch.float64))
    logps = torch.log(torch.tensor([[0.3, 0.2], [0.1, 0.4]], dtype=torch.float64)).requires_grad_()
    mask = torch.ones(2, 2, dtype=torch.bool)
    advantages = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    refined = torch.tensor([False, True])
    objective = CritiqueGRPO(critic=CRITIC)
    loss, metrics = objective.compute_loss(logps, old, advantages, mask, max_completion_length=5, refined=refined)
    assert loss.item() == pytest.approx((1.5 + 1 - 1 - 1.6) / (2 * 5))
    loss.backward()
    # d(r A) = r A; d(ρ A) = ρ (1 − ρ) A
    expected = [[1.5, 1.0], [-2 * 0.25, -2 * 0.16]]
    assert [pytest.approx([g / 10 for g in row]) for row in expected] == logps.grad.tolist()
    # π / π_old = 1/7 and 4/7 would be clipped, but shaped tokens are not.
    assert all(value == 0 for value in metrics.values())


def test_failed_refinements_are_penalised():
    logps = torch.log(torch.tensor([[0.1]])).requires_grad_()
    refined, mask = torch.tensor([True]), torch.ones(1, 1, dtype=torch.bool)
    objective = CritiqueGRPO(critic=CRITIC)
    loss, _ = objective.compute_loss(logps, logps.detach(), torch.tensor([-1.0]), mask, None, None, 1, refined=refined)
    loss.backward()
    assert logps.grad.item() > 0


def test_without_refinements_it_is_dr_grpo():
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(4, 3, generator=generator)
    arguments = (
        logps,
        logps - 0.3,
        torch.randn(4, generator=generator),
        torch.ones(4, 3, dtype=torch.bool),
        None,
        None,
        3,
    )
    expected, metrics = DrGRPO().compute_loss(*arguments)
    none = torch.zeros(4, dtype=torch.bool)
    for inputs in ({}, {"refined": none}):
        loss, measured = CritiqueGRPO(critic=CRITIC).compute_loss(*arguments, **inputs)
        assert loss == expected
        assert measured == metrics


def test_which_groups_are_refined():
    correct = torch.tensor([[True, False], [False, False], [True, True]])
    assert CritiqueGRPO(critic=CRITIC).to_refine(correct).tolist() == [False, True, False]
    assert CritiqueGRPOReleased(critic=CRITIC).to_refine(correct).tolist() == [True, True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"num_refinements": 0}, "num_refinements must be at least 1"),
        ({"refine_groups": "some"}, "refine_groups must be one of failed, all"),
        ({"join": "add"}, "join must be one of union, replace"),
        ({"scale_rewards": "batch"}, "scale_rewards must be one of none, group"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' does not apply"),
        ({"dynamic_sampling": True}, "dynamic_sampling"),
        ({"template": "{critique}"}, "must contain"),
        ({"template": "{prompt}{critique}{answer}"}, "no other"),
        ({"template": "{prompt}{critique}{"}, "not a valid format string"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        CritiqueGRPO(critic=CRITIC, **settings)
