"""Validation of a policy on held-out prompts, with a greedy response and with samples as in training."""

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from hybridmem.distributed import failing_together, rank_and_size
from hybridmem.rl.attention.action import Action
from hybridmem.rl.rollouts.agent_rollouts import Environments, act_out
from hybridmem.rl.rollouts.completions import Completions
from hybridmem.rl.rollouts.non_finite import NonFiniteLogits
from hybridmem.rl.rollouts.policy import Example
from hybridmem.rl.rollouts.random_streams import RandomStream, generators
from hybridmem.rl.rollouts.sampling import Sampling
from hybridmem.tasks.task import Task, exact_match

from .rollout_worker import RolloutWorker

SOLVED = 1.0  # reward of an environment whose task is solved
T = TypeVar("T")
Values = dict[str, Tensor | float]


@dataclass
class Answered:
    """Held-out examples with a policy's answers and their correctness.

    `sampled` holds num_generations responses to each example, grouped by example. `greedy_right` and `sampled_right`
    are empty for tasks without answers.
    """

    examples: list[Example]
    greedy: list[str]
    sampled: list[str]
    greedy_right: list[bool] = field(default_factory=list)
    sampled_right: list[bool] = field(default_factory=list)

    @property
    def times(self) -> int:
        """Number of sampled responses to each example."""
        return len(self.sampled) // len(self.examples)

    def by_example(self, of_samples: list[T]) -> list[list[T]]:
        """Group a value of every sampled response by example."""
        return [of_samples[start : start + self.times] for start in range(0, len(of_samples), self.times)]

    def judged(self, task: Task) -> "Answered":
        """Return the answers, judged by `task.is_right` if defined and otherwise by exact match."""
        judge = getattr(task, "is_right", None) or _is_answer
        answers = [example["answer"] for example in self.examples]
        repeated = [answer for answer in answers for _ in range(self.times)]
        return replace(self, greedy_right=judge(self.greedy, answers), sampled_right=judge(self.sampled, repeated))


def validate(worker: RolloutWorker, task: Task, batch: list[Example], first: int) -> tuple[Answered, Values]:
    """Answer held-out prompts, and return the answers and their metrics.

    Every validation uses the same random numbers. At temperature 0, samples equal the greedy answer.

    Args:
        worker: samples and rewards the answers.
        task: judges the answers.
        batch: held-out examples.
        first: index of the batch's first example among this rank's examples.
    """
    if worker.environments is not None:
        return _validate_acting(worker, worker.environments, batch, first)
    policy = worker.policy
    prompts = policy.prompt_batch([policy.data.prompt(example) for example in batch])
    each = _generators(worker, first, len(batch))
    with failing_together(NonFiniteLogits):
        greedy = policy.answer(prompts, 1, _greedy(worker), actions=worker.settled)
        drawn = (
            policy.answer(prompts, worker.num_generations, worker.sampling, each, worker.settled)
            if worker.sampling.temperature > 0
            else Completions(*(part.repeat_interleave(worker.num_generations, dim=0) for part in greedy))
        )
    texts, rewards = worker.reward(batch, greedy)
    sampled, _ = policy.texts_and_ids(drawn)
    answered = Answered(batch, texts, sampled)
    values: Values = {"reward": rewards.total.mean()}
    if "answer" not in batch[0]:
        return answered, values
    answered = answered.judged(task)
    return answered, values | _share_right(answered)


def answer_greedily(worker: RolloutWorker, examples: list[Example], actions: list[Action]) -> list[str]:
    """Return a greedy answer to the prompt of each example under some actions."""
    policy = worker.policy
    prompts = policy.prompt_batch([policy.data.prompt(example) for example in examples])
    with failing_together(NonFiniteLogits):
        completions = policy.answer(prompts, 1, _greedy(worker), actions=actions)
    return policy.texts_and_ids(completions)[0]


def _validate_acting(
    worker: RolloutWorker, environments: Environments, batch: list[Example], first: int
) -> tuple[Answered, Values]:
    """Act in the environments of held-out examples; a reward of 1 or more counts as solved."""
    each = _generators(worker, first, len(batch))
    with failing_together(NonFiniteLogits):
        actions = worker.settled
        acted = act_out(worker.policy, environments, batch, 1, _greedy(worker), actions=actions)
        tried = act_out(worker.policy, environments, batch, worker.num_generations, worker.sampling, each, actions)
    texts, rewards = worker.reward(batch, acted.completions, acted.environments)
    repeated = [example for example in batch for _ in range(worker.num_generations)]
    sampled, earned = worker.reward(repeated, tried.completions, tried.environments)
    answered = Answered(batch, texts, sampled, *((x.total >= SOLVED).tolist() for x in (rewards, earned)))
    return answered, {"reward": rewards.total.mean(), **_share_right(answered), "turns": tried.turns.float().mean()}


def _greedy(worker: RolloutWorker) -> Sampling:
    return Sampling(max_completion_length=worker.sampling.max_completion_length, temperature=0.0)


def _generators(worker: RolloutWorker, first: int, count: int) -> list[torch.Generator]:
    """Return a random generator for each held-out prompt, by its index among all prompts."""
    rank, size = rank_and_size()
    keys = [(worker.seed, int(RandomStream.VALIDATION), (first + place) * size + rank) for place in range(count)]
    return generators(worker.policy.device, *keys)


def _share_right(answered: Answered) -> dict[str, Any]:
    right = {"accuracy": answered.greedy_right, "pass@1": answered.sampled_right}
    return {name: sum(each) / len(each) for name, each in right.items()}


def _is_answer(completions: list[str], answers: list[str]) -> list[bool]:
    return [score == 1 for score in exact_match(completions, answers)]
