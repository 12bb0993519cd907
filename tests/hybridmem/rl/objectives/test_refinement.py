"""Refinements join failed groups and are learned after the original prompt; failing critics stop nothing."""

import logging
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from hybridmem.rl import CritiqueGRPO, CritiqueGRPOReleased, IndicativeCritic
from hybridmem.rl.objectives.critique import best_of_groups, joined
from hybridmem.rl.rollouts.completions import Completions
from hybridmem.rl.rollouts.experience import Rollout
from hybridmem.rl.rollouts.non_finite import NonFiniteLogits
from hybridmem.rl.rollouts.policy import Policy
from hybridmem.rl.rollouts.prompts import Prompt
from hybridmem.rl.rollouts.sampling import Sampling
from hybridmem.training.policy.learner import Learner
from hybridmem.training.policy.rollout_worker import RolloutWorker
from tests.hybridmem.training.policy.test_module import ATTENTION, Letters, write_config
from tests.hybridmem.training.runs import hybridmem, logged
from tests.several import as_processes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
P, Q = Prompt([1]), Prompt([2])
CRITIC = {"class_path": "hybridmem.rl.IndicativeCritic"}


def critique(critic=CRITIC, name="CritiqueGRPO", **settings):
    """Return the objective with the given settings."""
    return {"class_path": f"hybridmem.rl.{name}", "init_args": {"critic": critic, **settings}}


def completions(*rows: list[int]) -> Completions:
    """Return responses of these tokens, padded with 9."""
    length = max(map(len, rows))
    mask = torch.tensor([[n < len(row) for n in range(length)] for row in rows])
    ids = torch.tensor([[*row, *[9] * (length - len(row))] for row in rows])
    return Completions(ids, mask, torch.zeros(len(rows), dtype=torch.bool), torch.zeros(len(rows), length))


def test_best_of_groups():
    rewards = torch.tensor([0.0, 0.5, 0.5, 1.0, 0.0, 0.2])
    groups = torch.tensor([0, 0, 0, 2, 2, 2])
    assert best_of_groups(rewards, groups, 1).tolist() == [1, 3]
    assert best_of_groups(rewards, groups, 2).tolist() == [1, 2, 3, 5]
    assert best_of_groups(rewards, groups, 9).tolist() == [1, 2, 0, 3, 5, 4]


@pytest.mark.parametrize("join", ["union", "replace"])
def test_joined(join):
    initial = completions([1], [2], [3], [4], [5], [6])
    rollout = Rollout([P, Q, P], initial, torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5]))
    whole = joined(rollout, completions([7, 7], [8]), torch.tensor([1.0, 0.9]), torch.tensor([0, 2]), join, 2, 9)
    if join == "union":
        assert whole.completions.ids[:, 0].tolist() == [1, 2, 7, 3, 4, 5, 6, 8]
        assert whole.refined.tolist() == [False, False, True, False, False, False, False, True]
        assert whole.sizes.tolist() == [3, 2, 3]
        assert whole.rewards.tolist() == pytest.approx([0.0, 0.1, 1.0, 0.2, 0.3, 0.4, 0.5, 0.9])
    else:
        assert whole.completions.ids[:, 0].tolist() == [2, 7, 3, 4, 6, 8]
        assert whole.sizes.tolist() == [2, 2, 2]
        assert whole.refined.tolist() == [False, True, False, False, False, True]
    assert whole.completions.mask.sum().item() == len(whole.refined) + 1


def worker(answers, rewards):
    """Return the parts of a rollout worker that refinement needs, with a record of prompts and metrics."""
    asked: list[str] = []
    logs: dict[str, Any] = {}

    def prompt(example):
        if len(example["prompt"]) > 40:
            raise ValueError("max_prompt_length=40 is too short")
        asked.append(example["prompt"])
        return Prompt([len(asked)])

    return SimpleNamespace(
        num_generations=2,
        asked=asked,
        logs=logs,
        measure=lambda name, value, weight=1: logs.__setitem__(name, value),
        policy=SimpleNamespace(data=SimpleNamespace(prompt=prompt, pad_id=9)),
        answer_refinements=lambda *_: answers,
        reward=lambda examples, _: ([], SimpleNamespace(total=torch.tensor(rewards))),
    )


class Spoilt:
    """Objective whose refinements have non-finite logits on rank 1."""

    def __init__(self, rank: int):
        self.rank = rank

    def refine(self, rollout, examples, texts, worker):
        """Raise an error on rank 1, and return the rollout on others."""
        if self.rank == 1:
            raise NonFiniteLogits("the policy's logits are non-finite")
        return rollout


def refined_on(rank):
    class Worker(RolloutWorker):
        """Rollout worker without a policy."""

        def __init__(self):
            self.policy = MagicMock(model=torch.nn.Linear(1, 1))
            self.policy.data.prompt.return_value = P
            self.policy.prompt_batch.return_value.input_ids = torch.zeros(1, 1)
            self.objectives, self.sampling = {"spoilt": Spoilt(rank)}, Sampling(max_completion_length=1)
            self.environments, self.num_rollouts = None, 0

        def generators(self, stream, places):
            return []

        def _choose_actions(self, time, each):
            return {}

        def _sample(self, prompts, actions, each):
            return completions([1])

        def _rewarded(self, examples, completions, environments=None):
            return ["a"], SimpleNamespace(total=torch.zeros(1))

        def _shape(self, rewards, turns, faulty, max_turns):
            return rewards, None

    with pytest.raises(NonFiniteLogits) as error:
        Worker().roll_out([{"prompt": "P"}])
    return str(error.value)


def test_a_refinement_that_fails_on_one_rank_ends_all():
    assert as_processes(2, refined_on) == ["the policy's logits are non-finite"] * 2


def test_only_groups_that_failed_are_refined():
    examples = [{"prompt": "P", "answer": "x"}, {"prompt": "Q", "answer": "y"}]
    rollout = Rollout([P, Q], completions([1], [2], [3], [4]), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    fake = worker(completions([5], [6]), [0.0, 1.0])
    objective = CritiqueGRPO(critic=IndicativeCritic(wrong="no"), template="{prompt}|{response}|{critique}")
    whole = objective.refine(rollout, examples, ["a", "b", "c", "d"], fake)
    assert fake.asked == ["Q|c|no", "Q|d|no"]
    assert whole.completions.ids[:, 0].tolist() == [1, 2, 3, 4, 6]
    assert whole.sizes.tolist() == [2, 3]
    assert whole.prompts == [P, Q]
    assert fake.logs["critique/refined_groups"] == 0.5
    assert fake.logs["critique/rescued_groups"] == 1
    assert fake.logs["critique/sampled"] == 2
    assert fake.logs["critique/unrefined"] == 0


def test_no_critique_and_no_room_are_no_refinement(caplog):
    examples = [{"prompt": "P"}, {"prompt": "Q" * 40}]
    rollout = Rollout([P, Q], completions([1], [2], [3], [4]), torch.zeros(4))
    fake = worker(None, None)

    def critic(prompts, **_):
        return [None, None, "no", "no"]

    with caplog.at_level(logging.WARNING):
        assert CritiqueGRPO(critic=critic).refine(rollout, examples, ["", "", "", ""], fake) is rollout
    assert fake.logs["critique/unrefined"] == 4
    assert fake.logs["critique/sampled"] == 0
    assert "max_prompt_length=40" in caplog.text
    with pytest.raises(ValueError, match="returned 1 critiques for 4 responses"):
        CritiqueGRPO(critic=lambda **_: [None]).refine(rollout, examples, [""] * 4, fake)


def test_the_released_code_replaces_the_first_response_of_every_group():
    examples = [{"prompt": "P"}, {"prompt": "Q"}]
    rollout = Rollout([P, Q], completions([1], [2], [3], [4]), torch.tensor([0.0, 1.0, 0.0, 0.0]))
    fake = worker(completions([5], [6], [7], [8]), [1.0, 0.0, 0.0, 0.0])
    objective = CritiqueGRPOReleased(critic=IndicativeCritic(), template="{prompt} {critique}")
    whole = objective.refine(rollout, examples, ["a", "b", "c", "d"], fake)
    assert sorted(whole.completions.ids[:, 0].tolist()) == [2, 4, 5, 7]
    assert whole.sizes.tolist() == [2, 2]


class Hard(Letters):
    """Task with a rare success: both letters must precede c."""

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return 1 or 0."""
        return [float(len(text) == 2 and max(text) < "c") for text in completions]


def down(prompts, **columns):
    """Return no critique for any response."""
    return [None] * len(prompts)


@pytest.mark.parametrize(
    ("objectives", "changes"),
    [
        ([critique()], {}),
        ([critique()], {"model__init_args__steps_per_generation": 2}),
        ([critique(), ATTENTION], {}),
        ([critique(beta=0.04)], {}),
        ([critique(name="CritiqueGRPOReleased")], {}),
        ([critique(critic=f"{__name__}.down")], {}),
    ],
)
def test_trains(objectives, changes, tmp_path, monkeypatch):
    config = write_config(
        tmp_path, data__init_args__task=f"{__name__}.Hard", model__init_args__objectives=objectives, **changes
    )
    hybridmem(monkeypatch, "fit", "--config", config)
    assert logged(tmp_path, "critique/refined_groups")


def test_refinements_are_scored_after_the_original_prompt(tmp_path, monkeypatch):
    scored, sampled = [], []

    def score(self, batch, times, families, original=Learner._score):
        scored.append((batch.prompts.input_ids.shape[1], len(batch.completions.ids), times))
        return original(self, batch, times, families)

    def answer(self, prompts, *rest, original=Policy.answer):
        sampled.append(prompts.input_ids.shape[1])
        return original(self, prompts, *rest)

    monkeypatch.setattr(Learner, "_score", score)
    monkeypatch.setattr(Policy, "answer", answer)
    objective = critique(correct_reward=2.0)  # all responses fail
    config = write_config(tmp_path, model__init_args__objectives=[objective], trainer__max_steps=2)
    hybridmem(monkeypatch, "fit", "--config", config)
    assert set(scored) == {
        (4, 2 * (4 + 1), 4 + 1)
    }  # two prompts of four letters, with four responses and one refinement each
    assert max(sampled) > 40


def test_exploration_is_refused(tmp_path, monkeypatch, capsys):
    explored = {"class_path": "hybridmem.rl.AttentionRL", "init_args": {"exploration": 1.0}}
    config = write_config(tmp_path, model__init_args__objectives=[critique(), explored])
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config)
    assert "exploration is incompatible with CritiqueGRPO" in capsys.readouterr().err
