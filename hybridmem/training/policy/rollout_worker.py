"""Rollout worker that samples responses to a batch of prompts and rewards them."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hybridmem.distributed import Meter, failing_together, gather_groups, rank_and_size, unsharded
from hybridmem.rl.attention.action import Action
from hybridmem.rl.objectives.advantages import groups_with_signal
from hybridmem.rl.objectives.objective import Objective
from hybridmem.rl.rewards.functions import Rewards, RewardSum
from hybridmem.rl.rollouts.agent_rollouts import Environments, act_out
from hybridmem.rl.rollouts.completions import Completions
from hybridmem.rl.rollouts.experience import Rollout
from hybridmem.rl.rollouts.non_finite import NonFiniteLogits
from hybridmem.rl.rollouts.policy import Example, Policy
from hybridmem.rl.rollouts.prompts import Prompt, PromptBatch
from hybridmem.rl.rollouts.random_streams import RandomStream, generators
from hybridmem.rl.rollouts.sampling import Sampling


@runtime_checkable
class Sampler(Protocol):
    """Source of a rollout's responses: the trainer itself, or a server."""

    def respond(
        self,
        policy: Policy,
        prompts: PromptBatch,
        num_generations: int,
        sampling: Sampling,
        generators: list[torch.Generator],
        actions: Sequence[Action] = (),
    ) -> Completions:
        """Return `num_generations` responses to each prompt."""
        ...


class LocalSampler:
    """Sampler that uses the trainer's own copy of the policy."""

    def respond(
        self,
        policy: Policy,
        prompts: PromptBatch,
        num_generations: int,
        sampling: Sampling,
        generators: list[torch.Generator],
        actions: Sequence[Action] = (),
    ) -> Completions:
        """Return `num_generations` responses to each prompt."""
        return policy.answer(prompts, num_generations, sampling, generators, actions)


class RolloutWorker:
    """Worker that samples responses, single-turn or in environments, and rewards them.

    Args:
        policy: policy that responds.
        objectives: objectives by family, which may choose actions, shape rewards and add responses.
        rewards: reward functions.
        sampler: sampler of single-turn responses.
        environments: environments of multi-turn responses; None for single turns.
        num_generations: responses to each prompt.
        sampling: sampling parameters.
        seed: seed of the random numbers.
        meter: collects the metrics.
    """

    def __init__(
        self,
        policy: Policy,
        objectives: dict[str, Objective],
        rewards: RewardSum,
        sampler: Sampler,
        environments: Environments | None,
        num_generations: int,
        sampling: Sampling,
        seed: int,
        meter: Meter,
    ):
        self.policy, self.objectives, self.rewards = policy, objectives, rewards
        self.sampler, self.environments = sampler, environments
        self.num_generations, self.sampling, self.seed, self.meter = num_generations, sampling, seed, meter
        self.num_rollouts = 0  # since the run began, across restarts
        self.last_responses: list[tuple[str, str, float]] = []  # prompt, response and reward of the last rollout
        self.last_rewards: Float[Tensor, " responses"]  # of all ranks' sampled responses in the last rollout

    def generators(self, stream: RandomStream, places: Sequence[tuple[int, ...]]) -> list[torch.Generator]:
        """Return a random generator for each prompt of this rank's batch, independent of the number of ranks.

        Args:
            stream: purpose of the random numbers.
            places: each prompt's place in the batch, followed by numbers that distinguish entries at that place.
        """
        rank, size = rank_and_size()
        keys = [(self.seed, int(stream), self.num_rollouts, place * size + rank, *rest) for place, *rest in places]
        return generators(self.policy.device, *keys)

    @property
    def settled(self) -> list[Action]:
        """Settled choices of the objectives, under which held-out prompts are answered."""
        found = (objective.settle(self.policy) for objective in self.objectives.values())
        return [action for action in found if action is not None]

    def measure(self, name: str, value: Tensor | float, weight: Tensor | float | int = 1) -> None:
        """Record a metric, to be averaged over all ranks by weight."""
        self.meter.measure(name, value, weight)

    @torch.no_grad()
    def roll_out(self, examples: list[Example]) -> Rollout:
        """Sample and reward responses to a batch of prompts, and measure them under TRL's metric names."""
        with unsharded(self.policy.model):  # throughout, because ranks may sample different numbers of tokens
            rollout = self._answer(examples) if self.environments is None else self._act(examples, self.environments)
        self.num_rollouts += 1
        return rollout

    def _answer(self, examples: list[Example]) -> Rollout:
        asked = [self.policy.data.prompt(example) for example in examples]
        prompts = self.policy.prompt_batch(asked)
        each = self.generators(RandomStream.ROLLOUT, [(place,) for place in range(len(examples))])
        actions = self._choose_actions(prompts.input_ids.shape[1] + self.sampling.max_completion_length, each)
        completions = self._sample(prompts, actions, each)
        time = prompts.input_ids.shape[1] + completions.ids.shape[1]
        texts, rewards = self._rewarded(examples, completions)
        turns, faulty = torch.ones(len(completions.ids), dtype=torch.long), torch.zeros_like(completions.mask)
        shaped, kept = self._shape(rewards.total, turns, faulty, max_turns=1)
        cut = {family: action.cut(time) for family, action in actions.items()}
        rollout = Rollout(asked, completions, shaped, cut, kept=kept)
        with failing_together(NonFiniteLogits):
            for objective in self.objectives.values():
                rollout = objective.refine(rollout, examples, texts, self)
        return rollout

    def _choose_actions(self, time: int, each: list[torch.Generator]) -> dict[str, Action]:
        found = {
            family: objective.act(self.policy, self.num_generations, time, each)
            for family, objective in self.objectives.items()
        }
        return {family: action for family, action in found.items() if action is not None}

    def _sample(self, prompts: PromptBatch, actions: dict[str, Action], each: list[torch.Generator]) -> Completions:
        """Sample responses, each under its own actions."""
        with failing_together(NonFiniteLogits):
            chosen = list(actions.values())
            return self.sampler.respond(self.policy, prompts, self.num_generations, self.sampling, each, chosen)

    def _act(self, examples: list[Example], environments: Environments) -> Rollout:
        each = self.generators(RandomStream.ROLLOUT, [(place,) for place in range(len(examples))])
        actions = self._choose_actions(0, each)
        with failing_together(NonFiniteLogits):
            acted = act_out(
                self.policy, environments, examples, self.num_generations, self.sampling, each, list(actions.values())
            )
        _, rewards = self._rewarded(examples, acted.completions, acted.environments)
        for name, (value, weight) in acted.metrics().items():
            self.measure(name, value, weight)
        shaped, kept = self._shape(rewards.total, acted.turns.cpu(), acted.faulty, environments.max_turns)
        time = self.policy.prompt_batch(acted.prompts).input_ids.shape[1] + acted.completions.ids.shape[1]
        cut = {family: action.cut(time) for family, action in actions.items()}
        return Rollout(acted.prompts, acted.completions, shaped, cut, kept=kept)

    def _shape(
        self,
        rewards: Float[Tensor, " responses"],
        turns: Int[Tensor, " responses"],
        faulty: Bool[Tensor, "responses length"],
        max_turns: int,
    ) -> tuple[Float[Tensor, " responses"], Bool[Tensor, "responses length"] | None]:
        """Return shaped rewards, and a mask of the tokens that may carry loss, or None for all tokens."""
        shaped, kept = rewards, None
        for objective in self.objectives.values():
            changed = objective.shape_rewards(shaped, turns, max_turns)
            if changed is not None:
                shaped = changed
                self.measure("reward/shaped", shaped.mean())
            chosen = objective.kept_tokens(rewards, faulty, self.num_generations)
            if chosen is not None:
                kept = chosen if kept is None else kept & chosen
        return shaped, kept

    def _rewarded(
        self, examples: list[Example], completions: Completions, environments: list[Any] | None = None
    ) -> tuple[list[str], Rewards]:
        """Return texts and rewards of this rank's responses, and measure the rewards of all ranks."""
        repeated = [example for example in examples for _ in range(self.num_generations)]
        texts, rewards = self.reward(repeated, completions, environments)
        everyones = Rewards(*(gather_groups(x, self.num_generations) for x in rewards))
        self.last_rewards = everyones.total.cpu()
        if self.num_generations > 1:
            signal = groups_with_signal(everyones.total, self.num_generations)
            self.measure("frac_reward_zero_std", (~signal).float().mean())
        for name, value in self.rewards.metrics(everyones).items():
            self.measure(name, value)
        self.measure("completions/mean_length", completions.mask.sum(1).float().mean())
        self.measure("completions/clipped_ratio", completions.truncated.float().mean())
        self.last_responses = list(zip([e["prompt"] for e in repeated], texts, rewards.total.tolist(), strict=True))
        return texts, rewards

    def reward(
        self, examples: list[Example], completions: Completions, environments: list[Any] | None = None
    ) -> tuple[list[str], Rewards]:
        """Return the texts and rewards of responses, one per example."""
        texts, ids = self.policy.texts_and_ids(completions)
        columns = {name: [example[name] for example in examples] for name in examples[0] if name != "prompt"}
        if environments is not None:
            columns["environments"] = environments
        return texts, self.rewards([example["prompt"] for example in examples], texts, ids, **columns)

    @torch.no_grad()
    def contrasted(self, examples: list[Example], family: str, number: int) -> Float[Tensor, " responses"] | None:
        """Return the rewards of two responses to each prompt under an objective's most different actions, or None.

        Args:
            examples: examples of the task, the same ones on every rank.
            family: the objective's family.
            number: distinguishes calls.
        """
        action = self.objectives[family].contrast(self.policy, len(examples), 2)
        if action is None:
            return None
        keys = [(self.seed, int(RandomStream.CONTRAST), number, place) for place in range(len(examples))]
        each, repeated = generators(self.policy.device, *keys), [example for example in examples for _ in range(2)]
        with unsharded(self.policy.model), failing_together(NonFiniteLogits):
            if self.environments is not None:
                acted = act_out(self.policy, self.environments, examples, 2, self.sampling, each, [action])
                return self.reward(repeated, acted.completions, acted.environments)[1].total
            prompts = self.policy.prompt_batch([self.policy.data.prompt(example) for example in examples])
            completions = self.policy.answer(prompts, 2, self.sampling, each, [action])
        return self.reward(repeated, completions)[1].total

    def answer_refinements(self, prompts: list[Prompt], places: Sequence[tuple[int, int]]) -> Completions:
        """Return one response to each prompt; `places` holds each prompt's (group, response within the group)."""
        each = self.generators(RandomStream.REFINEMENT, places)
        return self.policy.answer(self.policy.prompt_batch(prompts), 1, self.sampling, each)
