"""The policy of allocations: its likelihood, its antithetic pairs, and the gradient that reward gives it."""

from itertools import product

import pytest
import torch

from hybridmem.rl.attention.allocations import MAX_LOGIT, AllocationPolicy
from hybridmem.rl.objectives.allocation import AllocationRL

UNITS = torch.tensor(list(product([False, True], repeat=6))).view(-1, 2, 3)


def six_units(seed=0):
    policy = AllocationPolicy(2, 3, per_layer=False, initial=0.5).double()
    policy.logits = torch.nn.Parameter(torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)).double())
    return policy


def rewards_of(opened):
    """A reward with interactions: units 0 and 4 together, or unit 2 without unit 5."""
    a = opened.flatten(1).double()
    return a[:, 0] * a[:, 4] + 0.7 * a[:, 2] * (1 - a[:, 5]) - 0.2 * a.mean(1)


def expected_reward(policy):
    return (policy.log_likelihood(UNITS).exp() * rewards_of(UNITS)).sum()


def test_likelihoods_of_all_allocations_sum_to_one():
    policy = six_units()
    torch.testing.assert_close(policy.log_likelihood(UNITS).exp().sum(), torch.ones((), dtype=torch.float64))


def test_the_loss_over_all_allocations_has_the_exact_gradient():
    policy = six_units()
    (wanted,) = torch.autograd.grad(expected_reward(policy), policy.logits)
    logps = policy.log_likelihood(UNITS)
    old = logps.detach()
    weighted = rewards_of(UNITS) * old.exp() * len(UNITS)  # the loss is a mean over allocations
    (found,) = torch.autograd.grad(AllocationRL().compute_loss(logps, old, weighted), policy.logits)
    torch.testing.assert_close(found, -wanted, rtol=0, atol=1e-14)


def pair_gradient(policy):
    """Return the expected loss gradient of one antithetic pair, over all 4096 joint outcomes."""
    p = policy.probabilities.detach().flatten()
    outcomes = torch.tensor(list(product(range(4), repeat=6)))  # 2 a + a' of every unit
    joint = torch.stack(
        [(1 - 2 * p).clamp(min=0), torch.minimum(p, 1 - p), torch.minimum(p, 1 - p), (2 * p - 1).clamp(min=0)]
    )
    weight = joint.gather(0, outcomes).prod(1)
    first, second = (outcomes >= 2).view(-1, 2, 3), (outcomes % 2 == 1).view(-1, 2, 3)
    half = (rewards_of(first) - rewards_of(second)) / 2
    logps = torch.stack([policy.log_likelihood(first), policy.log_likelihood(second)])
    loss = -(weight * (half * logps[0] - half * logps[1]) / 2).sum()
    return torch.autograd.grad(loss, policy.logits)[0]


def test_drawn_pairs_have_the_enumerated_gradient():
    policy = six_units()
    opened = policy.draw(40_000, torch.Generator().manual_seed(0))
    logps, rewards = policy.log_likelihood(opened), rewards_of(opened)
    advantages = (rewards.view(-1, 2) - rewards.view(-1, 2).mean(1, keepdim=True)).flatten()
    scores = (opened.double() - policy.probabilities.detach()).flatten(1) * advantages[:, None]
    error = scores.view(-1, 2, 6).mean(1).std(0) / 20_000**0.5
    (found,) = torch.autograd.grad(AllocationRL().compute_loss(logps, logps.detach(), advantages), policy.logits)
    wanted = pair_gradient(policy)
    assert ((found - wanted).flatten().abs() < 4 * error).all()
    (ascent,) = torch.autograd.grad(expected_reward(policy), policy.logits)
    assert torch.cosine_similarity(-wanted.flatten(), ascent.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("count", [1, 2, 7])
def test_pairs_are_antithetic(count):
    policy = six_units()
    opened = policy.draw(count, torch.Generator().manual_seed(3))
    assert opened.shape == (count, 2, 3)
    p = policy.probabilities.detach()
    for first, second in zip(opened[0::2], opened[1::2], strict=False):
        assert (first | second)[p >= 0.5].all()  # u and 1 - u are not both above p
        assert not (first & second)[p < 0.5].any()


def test_ratios_far_from_one_are_clipped():
    logps = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = AllocationRL(epsilon=0.2).compute_loss(logps, torch.zeros(2), torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(loss, torch.tensor(-(1.2 - 0.8) / 2))
    loss.backward()
    assert torch.equal(logps.grad, torch.zeros(2))


def test_precision_plugins_leave_the_policy_alone():
    policy = AllocationPolicy(2, 3, per_layer=True, initial=0.8)
    torch.nn.ModuleDict({"Allocation": policy}).to(torch.bfloat16)
    assert policy.logits.dtype == torch.float32
    assert policy.price.dtype == torch.float64
    assert policy.num_rollouts.dtype == torch.long


def test_units_keep_exploring_and_ranks_follow_their_logits():
    policy = six_units()
    with torch.no_grad():
        policy.logits.copy_(torch.tensor([[9.0, -9.0, 0.1], [0.2, 0.3, -0.4]]))
    policy.clamp()
    assert policy.logits.abs().max() == MAX_LOGIT
    assert policy.ranked(2).tolist() == [[True, False, False], [False, True, False]]
    assert not policy.ranked(0).any()
