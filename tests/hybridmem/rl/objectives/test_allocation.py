"""Allocations as objectives: ratios, the reference of a KL penalty, and the teacher of a distillation."""

from unittest.mock import MagicMock

import pytest
import torch

from hybridmem.convert import convert
from hybridmem.rl.objectives.allocation import AllocationRL, reward_floor
from hybridmem.rl.objectives.allocation_supervised import AllocationDistillation
from hybridmem.rl.objectives.objective import ObjectiveError
from hybridmem.rl.objectives.token import GRPO
from hybridmem.rl.rollouts.completions import Completions
from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy, with_adapters
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.scoring import completion_logps
from tests.hybridmem.rl.attention.test_sources import PROMPTS, llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
NOTHING = Scores(torch.zeros(4, 3), torch.zeros(4, 3), {})


def experience(actions, rewards=(1.0, 0.0, 0.5, 0.0), groups=(0, 0, 1, 1)):
    """Two prompts with two responses each, or other groups, as far as objectives read them."""
    ids = torch.randint(8, 37, (4, 3), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    completions = Completions(ids, mask, ~mask[:, 0], torch.zeros(4, 3))
    prompts = pad_prompts(PROMPTS, 0, torch.device("cpu")).repeat(2)
    zeros, rows = torch.zeros(4), torch.tensor(groups)
    given = torch.tensor(rewards)
    return Experience(prompts, rows, completions, given, zeros, mask, mask.sum().double(), 3, actions=actions)


def generators():
    """A generator for each prompt."""
    return [torch.Generator().manual_seed(n) for n in range(2)]


def test_ratios_are_one_after_a_step_beyond_the_clamp():
    policy = Policy(convert(llama(), attention_window=4).eval(), MagicMock())
    objective = AllocationRL(budget=0.5)
    objective.prepare(policy, MagicMock())
    gates = objective.gates(policy)
    with torch.no_grad():
        gates.logits.copy_(torch.tensor([[4.3, -4.3], [0.5, -0.5]]))
    action = objective.act(policy, 2, 0, generators())
    batch = experience({"Allocation": action})
    objective.review(policy, batch, 1.0)
    objective.loss(policy, batch, NOTHING, NOTHING, 1.0)
    torch.testing.assert_close(gates.log_likelihood(action.opened), action.old_logps, rtol=0, atol=0)


@pytest.mark.parametrize("nats", [100.0, -100.0, 1e4])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_ratios_far_apart_stay_finite(nats, advantage):
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    old, advantages = torch.tensor([-1.0 - nats, -2.0]), torch.tensor([advantage, 1.0])
    loss = AllocationRL(budget=0.5).compute_loss(logps, old, advantages)
    loss.backward()
    assert loss.isfinite()
    assert logps.grad.isfinite().all()
    assert logps.grad[1] == -0.5, "an ordinary allocation keeps its gradient"


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["converted", "llama"])
def test_a_reference_model_reads_by_the_allocation(kind, adapted):
    model = convert(llama(), attention_window=8, num_sink_tokens=1).eval() if kind == "converted" else llama()
    policy, penalty = Policy(model, MagicMock(), adapted), GRPO(beta=0.1)
    objective = AllocationRL(budget=0.5, initial=0.3, attention_window=3, num_sink_tokens=0)
    penalty.prepare(policy, MagicMock())
    objective.prepare(policy, MagicMock())
    if adapted:
        policy.model = with_adapters(model, {"target_modules": ["q_proj"]}).eval()
    action = objective.act(policy, 2, 0, generators())
    batch = experience({"Allocation": action})
    penalty.review(policy, batch, 1.0)
    read = batch.prompts, batch.completions, 1.0, 2
    torch.testing.assert_close(batch.ref_logps, completion_logps(policy.model, *read, [action])[0], rtol=0, atol=1e-5)
    assert (batch.ref_logps - completion_logps(policy.model, *read)[0]).abs().max() > 1e-3


def test_the_teacher_of_a_distillation_reads_everything():
    losses = []
    for source in ("memory", "full"):
        model = convert(llama(), attention_window=3, num_sink_tokens=0, head_source="memory").eval()
        model.set_head_sources([[source] * 2] * 2)
        policy, objective = Policy(model, MagicMock()), AllocationDistillation(source="none")
        objective.prepare(policy, MagicMock())
        batch = experience({"Allocation": objective.act(policy, 2, 0, generators())})
        losses.append(objective.loss(policy, batch, NOTHING, NOTHING, 1.0)[0])
    torch.testing.assert_close(*losses, rtol=0, atol=1e-9)


def test_a_mix_needs_no_reference_response():
    AllocationRL(estimator="mixed").check_run(1, 2)
    with pytest.raises(ValueError, match="sample 3 or more"):
        AllocationRL().check_run(1, 2)


@pytest.mark.parametrize(
    ("full", "share", "floor"), [(10.0, 0.9, 9.0), (-10.0, 0.9, -11.0), (-10.0, 1.1, -9.0), (0.0, 0.9, 0.0)]
)
def test_the_floor_lies_below_full_attention_for_rewards_of_either_sign(full, share, floor):
    assert reward_floor(full, share) == pytest.approx(floor)


def reviewed(rewards, rollouts):
    """Return the price after rollouts with the same rewards; the first of four responses reads everything."""
    policy = Policy(convert(llama(), attention_window=4).eval(), MagicMock())
    objective = AllocationRL()
    objective.prepare(policy, MagicMock())
    for _ in range(rollouts):
        action = objective.act(policy, 4, 0, generators()[:1])
        batch = experience({"Allocation": action}, rewards, groups=(0, 0, 0, 0))
        objective.review(policy, batch, 1.0)
    return float(objective.gates(policy).price)


def test_the_price_falls_below_a_negative_floor_and_rises_above_it():
    assert reviewed((-1.0, -1.05, -1.0, -1.1), 1) == pytest.approx(0.05)
    assert reviewed((-1.0, -1.2, -1.1, -1.3), 1) == 0


def test_full_attention_that_earns_nothing_stops_a_run():
    reviewed((-1.0, 0.0, 0.5, 0.0), 12)
    with pytest.raises(ObjectiveError, match="full attention, which earned nothing in 10 rollouts"):
        reviewed((0.0, 1.0, 0.0, 1.0), 12)
