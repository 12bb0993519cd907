"""Routers of writes: decisions on which a response depends, replayed in passes, and the exact gradient of reward."""

from itertools import product
from unittest.mock import MagicMock

import pytest
import torch

from hybridmem.rl.attention.recorder import AttentionRecorder
from hybridmem.rl.attention.routing import RouterPolicy, Routing, SettledRouting
from hybridmem.rl.attention.writes import find_memories
from hybridmem.rl.objectives.allocation import AllocationRL
from hybridmem.rl.rollouts.policy import Policy
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.sampling import Sampling, sample
from hybridmem.rl.rollouts.scoring import completion_logps
from tests.hybridmem.models import tiny_model, tokens
from tests.hybridmem.rl.attention.differences import assert_ascends

from .test_routing import trained
from .test_sources import PROMPTS, SAMPLING, llama

MODELS = {
    "mag": dict(variant="mag"),
    "mal": dict(variant="mal"),
    "lmm": dict(variant="lmm"),
    "mah": dict(variant="mah", head_sources=[["full", "memory"], ["none", "memory"]], num_sink_tokens=2),
}
for_every_model = pytest.mark.parametrize("kind", MODELS)


def model_of(kind):
    """Return a small model and its memories."""
    model = tiny_model(**MODELS[kind], attention_window=4)
    return model, find_memories(model)


def router_of(model, units):
    """Return a router with random weights."""
    return trained(RouterPolicy(len(units.layers), 1, model.config.hidden_size, 0.5))


@torch.no_grad()
@for_every_model
def test_a_response_depends_on_the_decisions_that_count(kind):
    model, units = model_of(kind)
    rows, time = tokens(2, 12), 12
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[1, :3] = False
    counts = units.counted(mask)
    writes = torch.ones(len(units.layers), 2, time)

    def logits():
        with units.routed(model, lambda place, _: writes[place]):
            return model(rows, attention_mask=mask.long()).logits[:, -1]

    wanted = logits()
    torch.testing.assert_close(wanted, model(rows, attention_mask=mask.long()).logits[:, -1])
    for token in range(time):
        writes[-1, :, token] = 0
        moved = (logits() - wanted).abs().amax(-1) > 1e-9
        assert torch.equal(moved, counts[:, token])
        writes[-1, :, token] = 1
    assert counts.sum().item() == (time - 6 + time - 3 - 6 if kind == "mah" else time + time - 3)


@for_every_model
def test_responses_are_scored_under_the_writes_that_sampled_them(kind):
    model, units = model_of(kind)
    policy, objective = Policy(model, MagicMock()), AllocationRL(unit="write", prefill="allocated")
    objective.prepare(policy, MagicMock())
    trained(objective.unit_policy(policy))
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    action = objective.act(policy, 4, 0, generators)
    prompts = pad_prompts(PROMPTS, 0, torch.device("cpu"))
    completions = sample(model, prompts, 4, SAMPLING, [7], 0, generators, [action])
    routing = action.cut(99)
    assert routing.opened[::4].all()  # the references store every token
    assert not routing.opened[1:4].all()
    logps, _ = completion_logps(model, prompts.repeat(4), completions, 1.0, 4, [routing])
    mask = completions.mask
    torch.testing.assert_close(logps[mask], completions.sampled_logps[mask], rtol=0, atol=1e-5)
    everything, _ = completion_logps(model, prompts.repeat(4), completions, 1.0, 4)
    assert (everything[mask] - logps[mask]).abs().max() > 1e-3
    counted = routing.counted(prompts.repeat(4).attention_mask, mask)
    share = (counted.opened & counted.counts[:, None]).sum((1, 2)) / (counted.counts.sum(1) * len(units.layers))
    torch.testing.assert_close(counted.costs, share.float())


@pytest.mark.parametrize("kind", ["mag", "mah"])
def test_the_loss_over_all_writes_has_the_exact_gradient(kind):
    model, units = model_of(kind)
    policy, time = router_of(model, units), 9 if kind == "mah" else 3
    counts = units.counted(torch.ones(64, time, dtype=torch.bool))
    assert counts[0].sum() == 3
    opened, inputs = torch.ones(64, 2, time, dtype=torch.bool), {}
    opened[:, :, counts[0]] = torch.tensor(list(product([False, True], repeat=6))).view(-1, 2, 3)

    def note(place, x):
        inputs[place] = x.detach()
        return opened[:, place].to(x.dtype)

    with torch.no_grad(), units.routed(model, note):
        rewards = model(tokens(1, time).expand(64, -1)).logits[:, -1].softmax(-1)[:, :9].sum(-1)
    assert rewards.std() > 1e-3
    stacked = torch.stack([inputs[0], inputs[1]], dim=1)
    routing = Routing(policy, units, "allocated", opened, stacked, counts, torch.zeros(64))

    def expected():
        return (policy.likelihoods(routing)[0].exp() * rewards).sum()

    logps = policy.likelihoods(routing)[0]
    torch.testing.assert_close(logps.exp().sum(), torch.ones((), dtype=torch.float64))
    loss = AllocationRL().compute_loss(logps, logps.detach(), rewards * logps.detach().exp() * 64)
    found = torch.autograd.grad(loss, [policy.weight, policy.bias])
    assert_ascends(
        [policy.weight, policy.bias],
        found,
        lambda each: [(layer, *[3] * (each.dim() - 1)) for layer in range(2)],
        expected,
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mag", "mah"])
def test_held_out_writes_follow_the_likelier_decision_with_and_without_a_cache(kind):
    model, units = model_of(kind)
    rule = SettledRouting(router_of(model, units), units)
    greedy, prompts = Sampling(max_completion_length=6, temperature=0.0), pad_prompts(PROMPTS, 0, torch.device("cpu"))
    completions = sample(model, prompts, 1, greedy, [], 0, None, [rule])
    logps, _ = completion_logps(model, prompts, completions, 1.0, 1, [rule])
    torch.testing.assert_close(logps, completions.sampled_logps, rtol=0, atol=1e-5)


@torch.no_grad()
@for_every_model
def test_every_second_response_of_a_contrast_stores_nothing(kind):
    model, units = model_of(kind)
    policy, objective = Policy(model, MagicMock()), AllocationRL(unit="write", prefill="allocated")
    objective.prepare(policy, MagicMock())
    rows = tokens(1, 12).expand(2, -1)
    with objective.contrast(policy, 1, 2).applied(model):
        found = model(rows).logits
    torch.testing.assert_close(found[0], model(rows).logits[0])
    with units.routed(model, lambda _, x: torch.zeros(x.shape[:2])):
        torch.testing.assert_close(found[1], model(rows).logits[1])
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(variant="swa"), "no head of this model's layers .swa. reads a memory"),
        (dict(variant="mah", head_sources=[["full", "none"]] * 2), "no head of this model's layers .mah. reads"),
        (dict(variant="mac"), "layers of mac store whole segments"),
        (dict(variant="mag", memory_depth=2), "memory_depth=2 stores every token"),
    ],
)
def test_models_without_memories_to_choose_from(settings, message):
    with pytest.raises(ValueError, match=message):
        find_memories(tiny_model(**settings))


def test_settings_that_do_not_go_with_writes():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no memory"):
        find_memories(llama())
    with pytest.raises(ValueError, match="prefill=full stores every token of a prompt"):
        AllocationRL(unit="write")
    with pytest.raises(ValueError, match="attention_window=4 belongs to units that read"):
        AllocationRL(unit="write", prefill="allocated", attention_window=4)


@torch.no_grad()
def test_a_memory_that_skips_tokens_is_not_recorded():
    model, units = model_of("mag")
    with (
        AttentionRecorder(model),
        units.routed(model, lambda _, x: torch.ones(x.shape[:2])),
        pytest.raises(ValueError, match="cannot record a memory that skips tokens"),
    ):
        model(tokens(1, 5))
