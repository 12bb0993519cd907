"""Routers of tokens: replayed decisions, their likelihood, and the exact gradient that reward gives them."""

from itertools import product
from unittest.mock import MagicMock

import pytest
import torch

from hybridmem.convert import convert
from hybridmem.rl.attention.allocations import MAX_LOGIT
from hybridmem.rl.attention.routing import RouterPolicy, Routing, SettledRouting
from hybridmem.rl.attention.sources import find_units
from hybridmem.rl.objectives.allocation import AllocationRL
from hybridmem.rl.rollouts.multi_turn import Reply, sample_turns
from hybridmem.rl.rollouts.policy import Policy
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.sampling import Sampling, read, sample
from hybridmem.rl.rollouts.scoring import completion_logps
from tests.hybridmem.models import tiny_model, tokens
from tests.hybridmem.rl.attention.differences import assert_ascends

from .test_sources import PROMPTS, SAMPLING, llama

KINDS = ("converted", "llama", "mag")


def model_of(kind):
    """Return a small model and its units with a window of four tokens."""
    if kind == "mag":
        model = tiny_model(variant="mag", attention_window=4)
        return model, find_units(model, "none", None, None)
    model = llama() if kind == "llama" else convert(llama()).eval()
    return model, find_units(model, "none", 4, 1)


def trained(policy, seed=0):
    """Give a router random weights, as training would."""
    random = torch.Generator().manual_seed(seed)
    for name, scale in (("weight", 20.0), ("bias", 1.0)):
        shape = getattr(policy, name).shape
        value = scale * torch.randn(shape, generator=random, dtype=torch.float64)
        setattr(policy, name, torch.nn.Parameter(value))
    return policy


def router_of(model, units):
    """Return a router with random weights."""
    return trained(RouterPolicy(len(units.layers), units.num_heads, model.config.hidden_size, 0.5))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_all_decide_alike_are_open_or_closed_units(kind):
    model, units = model_of(kind)
    rows = tokens(2, 16)
    for value in (0.0, 0.3, 1.0):
        share = torch.full((1, len(units.layers), units.num_heads), value)
        with units.applied(model, share):
            wanted = model(rows).logits
        with units.routed(model, lambda _, x, value=value: torch.full(x.shape[:2], value)):
            torch.testing.assert_close(model(rows).logits, wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_attention_function_routes_tokens_like_a_converted_model():
    rows, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1, :5] = 0
    pattern = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    found = []
    for kind in ("llama", "converted"):
        model, units = model_of(kind)
        with units.routed(model, lambda place, x: pattern[:, place].to(x.dtype)):
            found.append(model(rows, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_token_reads_its_window_alone(kind):
    model, units = model_of(kind)
    rows = tokens(1, 16)
    other = rows.clone()
    other[0, 2] = (other[0, 2] + 1) % 37
    share = torch.ones(len(units.layers), 16)
    for closed in (True, False):
        share[:, -1] = float(not closed)
        share[:-1] = 0  # the last layer alone carries token 2 to the last one
        with units.routed(model, lambda place, x: share[place].expand(len(x), -1)):
            moved = (model(rows).logits[0, -1] - model(other).logits[0, -1]).abs().max()
        assert (moved < 1e-9) == closed


@pytest.mark.parametrize("prefill", ["full", "allocated"])
@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_scored_under_the_decisions_that_sampled_them(kind, prefill):
    model, units = model_of(kind)
    policy, objective = (
        Policy(model, MagicMock()),
        AllocationRL(unit="token", prefill=prefill, attention_window=None if kind == "mag" else 4),
    )
    objective.prepare(policy, MagicMock())
    trained(objective.unit_policy(policy))
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    action = objective.act(policy, 4, 0, generators)
    prompts = pad_prompts(PROMPTS, 0, torch.device("cpu"))
    completions = sample(model, prompts, 4, SAMPLING, [7], 0, generators, [action])
    routing = action.cut(99)
    assert routing.opened.shape == (8, len(units.layers), 13 + completions.ids.shape[1] - 1)
    assert routing.opened[::4].all()
    assert not routing.opened[1:4].all()
    logps, _ = completion_logps(model, prompts.repeat(4), completions, 1.0, 4, [routing])
    mask = completions.mask
    torch.testing.assert_close(logps[mask], completions.sampled_logps[mask], rtol=0, atol=1e-5)
    some = torch.tensor([5, 2])
    part = type(completions)(*(x[some] for x in completions))
    again, _ = completion_logps(model, prompts.repeat(4).select(some), part, 1.0, 1, [routing.select(some)])
    torch.testing.assert_close(again, logps[some], rtol=0, atol=1e-5)


def six_decisions():
    """Return a model's logits, and its routing, under all decisions of three tokens in two layers."""
    model, units = model_of("mag")
    policy = router_of(model, units)
    opened = torch.tensor(list(product([False, True], repeat=6))).view(-1, 2, 3)
    inputs = {}

    def note(place, x):
        inputs[place] = x.detach()
        return opened[:, place].to(x.dtype)

    with torch.no_grad(), units.routed(model, note):
        logits = model(tokens(1, 3).expand(64, -1)).logits[:, -1]
    counts, zeros = torch.ones(64, 3, dtype=torch.bool), torch.zeros(64)
    stacked = torch.stack([inputs[0], inputs[1]], dim=1)
    return logits, Routing(policy, units, "allocated", opened, stacked, counts, zeros)


def test_the_loss_over_all_decisions_has_the_exact_gradient():
    """Inputs of the second layer depend on decisions in the first, and only the decisions depend on φ."""
    logits, routing = six_decisions()
    policy, rewards = routing.policy, logits.softmax(-1)[:, :9].sum(-1)
    assert (routing.inputs[:, 1] - routing.inputs[:1, 1]).abs().max() > 1e-3

    def expected():
        return (policy.likelihoods(routing)[0].exp() * rewards).sum()

    logps = policy.likelihoods(routing)[0]
    torch.testing.assert_close(logps.exp().sum(), torch.ones((), dtype=torch.float64))
    weighted = rewards * logps.detach().exp() * 64
    loss = AllocationRL().compute_loss(logps, logps.detach(), weighted)
    found = torch.autograd.grad(loss, [policy.weight, policy.bias])
    assert_ascends(
        [policy.weight, policy.bias],
        found,
        lambda each: [(layer, *[at] * (each.dim() - 1)) for layer, at in ((0, 0), (1, 3))],
        expected,
    )


@torch.no_grad()
def test_decisions_are_drawn_with_the_routers_probabilities():
    model, units = model_of("mag")
    policy, prompt = router_of(model, units), pad_prompts([PROMPTS[0]], 0, torch.device("cpu"))
    count = 4000
    action = policy.sample(units, count, [torch.Generator().manual_seed(0)], "allocated", False)
    with action.applied(model, "prompt"):
        read(model, prompt.repeat(count), None)
    opened = action.cut(13).opened[:, 0].double()  # inputs of the first layer are the same for all
    wanted = policy.probabilities(0, action.cut(13).inputs[:1, 0])[0]
    assert ((opened.mean(0) - wanted).abs() < 5 * 0.5 / count**0.5).all()
    both = opened.view(-1, 2, 13).sum(1)
    assert (both[:, wanted > 0.5] >= 1).all()  # antithetic: u and 1 - u are not both above p
    assert (both[:, wanted < 0.5] <= 1).all()


@torch.no_grad()
def test_a_prompts_decisions_are_independent_of_its_batch():
    model, units = model_of("mag")
    policy, found = router_of(model, units), []
    for prompts, seeds in ((PROMPTS, (3, 4)), (PROMPTS[1:], (4,))):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        action = policy.sample(units, 2, generators, "allocated", False)
        sample(model, pad_prompts(prompts, 0, torch.device("cpu")), 2, SAMPLING, [], 0, generators, [action])
        found.append(action.cut(0).opened[-2:, :, -13:])  # eight tokens of the prompt, five of the response
    assert torch.equal(*found)


def test_padding_and_last_tokens_do_not_count():
    _, routing = six_decisions()
    prompts = torch.tensor([[False, True]]).expand(64, -1)
    responses = torch.tensor([[True, True]]).expand(64, -1)
    counted = routing.counted(prompts, responses)
    assert counted.counts[0].tolist() == [False, True, True]
    torch.testing.assert_close(counted.costs, routing.opened[:, :, 1:].float().mean((1, 2)))
    assert routing.counted(prompts, torch.tensor([[True, False]]).expand(64, -1)).counts[0].tolist() == [
        False,
        True,
        False,
    ]
    observed = torch.tensor([[True, False, False, True]]).expand(64, -1)  # an environment speaks in between
    longer = torch.zeros(64, 2, 4, dtype=torch.bool)
    inputs = torch.zeros(64, 2, 3, routing.inputs.shape[3], dtype=torch.float64)
    late = Routing(routing.policy, routing.units, "full", longer, inputs, longer[:, 0, 1:], torch.zeros(64))
    assert late.counted(prompts[:, 1:], observed).counts[0].tolist() == [True] * 3
    assert late.costs.tolist() == [0.0] * 64


def test_a_group_of_single_tokens_decides_nothing():
    model, units = model_of("mag")
    policy = router_of(model, units)
    once = Sampling(max_completion_length=1)
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    action = policy.sample(units, 2, generators, "full", False)
    prompts = pad_prompts(PROMPTS, 0, torch.device("cpu"))
    completions = sample(model, prompts, 2, once, [], 0, generators, [action])
    mask = torch.ones_like(prompts.repeat(2).input_ids, dtype=torch.bool)
    routing = action.cut(14).counted(mask, completions.mask)
    assert routing.costs.tolist() == [0.0] * 4
    assert policy.likelihoods(routing)[0].tolist() == [0.0] * 4
    logps, _ = completion_logps(model, prompts.repeat(2), completions, 1.0, 2, [routing])
    torch.testing.assert_close(logps, completions.sampled_logps, rtol=0, atol=1e-5)


def test_trajectories_with_observations_are_scored_under_their_decisions():
    model, units = model_of("converted")
    policy = router_of(model, units)
    action = policy.sample(units, 2, [torch.Generator().manual_seed(0)], "allocated", False)
    prompts = pad_prompts([PROMPTS[0]], 0, torch.device("cpu"))
    replies = iter([Reply([5, 6, 9], False, False)] * 2 + [Reply([], False, True)] * 2)
    sampling = Sampling(max_completion_length=14)
    turns = sample_turns(
        model, prompts, 2, sampling, 2, lambda *_: next(replies), list(range(18)), 0, None, [action]
    ).completions
    mask = torch.ones_like(prompts.repeat(2).input_ids, dtype=torch.bool)
    routing = action.cut(0).counted(mask, turns.mask)
    assert routing.counts[:, :14].all()  # a prompt, and the first generated token
    logps, _ = completion_logps(model, prompts.repeat(2), turns, 1.0, 2, [routing])
    torch.testing.assert_close(logps[turns.mask], turns.sampled_logps[turns.mask], rtol=0, atol=1e-5)


@torch.no_grad()
def test_held_out_tokens_follow_the_likelier_decision_with_and_without_a_cache():
    model, units = model_of("converted")
    rule = SettledRouting(router_of(model, units), units)
    prompts, decided = pad_prompts(PROMPTS, 0, torch.device("cpu")), []

    def decide(place, x):
        decided.append(rule.decide(place, x))
        return decided[-1]

    with units.routed(model, decide):
        read(model, prompts, None)
    assert 0 < torch.stack(decided).mean() < 1
    greedy = Sampling(max_completion_length=6, temperature=0.0)
    completions = sample(model, prompts, 1, greedy, [], 0, None, [rule])
    logps, _ = completion_logps(model, prompts, completions, 1.0, 1, [rule])
    torch.testing.assert_close(logps, completions.sampled_logps, rtol=0, atol=1e-5)


def test_the_start_is_the_initial_probability_and_every_token_keeps_exploring():
    policy, x = RouterPolicy(2, 4, 8, 0.8), torch.randn(3, 5, 8)
    torch.testing.assert_close(policy.probabilities(1, x), torch.full((3, 5), 0.8))
    with torch.no_grad():
        policy.weight[0] = 1e4 * x[0, 0].sign()
    logits = policy.logits(x, policy.weight[0], policy.bias[0])
    assert logits[0, 0].item() == pytest.approx(MAX_LOGIT)
    assert logits.abs().max() <= MAX_LOGIT
