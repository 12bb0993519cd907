"""Learner that takes optimiser steps on a rollout or on given answers."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridmem.distributed import (
    Meter,
    all_gather_object,
    average_gradients,
    gather_groups,
    global_mean_weights,
    own_groups,
)
from hybridmem.rl.attention.action import Action, prefilled_once, reading
from hybridmem.rl.objectives.advantages import group_advantages
from hybridmem.rl.objectives.objective import Objective
from hybridmem.rl.rollouts.completions import Completions
from hybridmem.rl.rollouts.experience import Experience, Rollout, Scores
from hybridmem.rl.rollouts.policy import Example, Policy
from hybridmem.rl.rollouts.prompts import PromptBatch, Times
from hybridmem.rl.rollouts.sampling import Sampling
from hybridmem.rl.rollouts.scoring import completion_logps


class OptimizerStep:
    """Backward pass, gradient clipping, optimiser and learning-rate schedule.

    Args:
        model: model whose gradients are clipped.
        optimizer, schedule: stepped once for each loss.
        backward: runs the backward pass of a loss.
        max_grad_norm: gradients are clipped to this norm; None disables clipping.
        is_last: returns True once the run has taken all its optimiser steps.
        log: logs the gradient norm.
        unsynchronised: parameters whose gradients neither DDP nor a sharded model averages over ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        schedule: Any,
        backward: Callable[[Tensor], None],
        max_grad_norm: float | None,
        is_last: Callable[[], bool],
        log: Callable[[str, Tensor], None],
        unsynchronised: Sequence[torch.nn.Parameter] = (),
    ):
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.backward, self.max_grad_norm, self.is_last, self.log = backward, max_grad_norm, is_last, log
        self.unsynchronised = unsynchronised

    def __call__(self, loss: Float[Tensor, ""]) -> None:
        """Take one optimiser step on a loss."""
        self.optimizer.zero_grad()
        self.backward(loss)
        average_gradients(self.unsynchronised)
        if self.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            self.log("grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.optimizer.step()
        self.schedule.step()


class Learner:
    """Learner that turns rollouts into experience and minimises the sum of the objectives' losses.

    Args:
        policy: policy to train.
        objectives: objectives by family.
        step: takes an optimiser step.
        num_generations: responses to each prompt.
        num_iterations: passes over a rollout.
        steps_per_generation: optimiser steps per pass.
        sampling: sampling parameters of the rollout.
        meter: collects the metrics.
    """

    def __init__(
        self,
        policy: Policy,
        objectives: dict[str, Objective],
        step: OptimizerStep,
        num_generations: int,
        num_iterations: int,
        steps_per_generation: int,
        sampling: Sampling,
        meter: Meter,
    ):
        self.policy, self.objectives, self.step = policy, objectives, step
        self.num_generations, self.num_iterations = num_generations, num_iterations
        self.steps_per_generation, self.sampling, self.meter = steps_per_generation, sampling, meter
        self.compared = {name for name, objective in objectives.items() if objective.compares_with_rollout}
        self.learns_by_reward = any(objective.learns_by_reward for objective in objectives.values())
        self.reads_scores = any(objective.reads_scores for objective in objectives.values())

    def learn(self, rollout: Rollout) -> None:
        """Take the optimiser steps of a rollout."""
        experience = self._experience(rollout)
        first = True
        for _ in range(self.num_iterations):
            for rows in self._steps(len(rollout.rewards), len(rollout.prompts) * self.num_generations):
                if self.step.is_last():
                    return
                batch = experience.select(rows)
                if self.reads_scores:
                    scores = self._score(batch, self.policy.shared_times(batch.times), self.objectives.keys())
                    self._measure_pass(batch, scores, first)
                else:
                    sampled = batch.completions.sampled_logps
                    scores = Scores(sampled, torch.zeros_like(sampled), {})
                old = scores.detach(self.compared) if batch.old is None else batch.old
                if self.steps_per_generation == 1:  # the first pass still has the policy that sampled the rollout
                    experience.old = old
                self._take_step(self._loss(batch, scores, old))
                first = False

    def imitate(self, examples: list[Example]) -> None:
        """Take as many optimiser steps on the examples' answers as on a rollout of these examples."""
        for _ in range(self.num_iterations):
            for rows in self._steps(len(examples), len(examples)):
                if self.step.is_last():
                    return
                prompts, answers = self.policy.demonstrate([examples[row] for row in rows.tolist()])
                batch = self._demonstrated(prompts, answers)
                batch.actions = {
                    family: action
                    for family, objective in self.objectives.items()
                    if (action := objective.act(self.policy, 1, 0, [])) is not None
                }
                scores = Scores(answers.sampled_logps, answers.sampled_logps, {})
                if self.reads_scores:
                    actions = list(batch.actions.values())
                    logps, entropy = completion_logps(self.policy.model, prompts, answers, 1.0, actions=actions)
                    scores = Scores(logps, entropy, {})
                self._take_step(self._loss(batch, scores, scores))

    def _take_step(self, loss: Float[Tensor, ""]) -> None:
        self.step(loss)
        self.meter.measure("loss", loss)

    def _steps(self, responses: int, sampled: int) -> tuple[Tensor, ...]:
        """Return the rows of each optimiser step of a pass.

        All ranks take equally many steps, even if they refined different numbers of responses.
        """
        return torch.arange(responses).tensor_split(min(self.steps_per_generation, sampled))

    def _experience(self, rollout: Rollout) -> Experience:
        """Return the inputs of the objectives that follow from a rollout alone, without passes of the policy."""
        even = torch.full((len(rollout.prompts),), self.num_generations)
        sizes = even if rollout.sizes is None else rollout.sizes
        completions = Completions(*(x.to(self.policy.device) for x in rollout.completions))
        mask = self._loss_mask(rollout, completions)
        items = torch.stack(all_gather_object(mask.sum().cpu())).double().mean().to(self.policy.device)
        experience = Experience(
            self.policy.prompt_batch(rollout.prompts).repeat(sizes),
            torch.arange(len(sizes)).repeat_interleave(sizes),
            completions,
            rollout.rewards.to(self.policy.device),
            self._advantages(rollout.rewards, sizes).to(self.policy.device),
            mask,
            items / self.steps_per_generation,
            self.sampling.max_completion_length,
            actions=rollout.actions,
            refined=None if rollout.refined is None else rollout.refined.to(self.policy.device),
        )
        unlike = any(not action.in_passes for action in rollout.actions.values())
        several = (self.learns_by_reward or bool(self.compared)) and self.steps_per_generation > 1
        if self.reads_scores and (unlike or several):
            experience.old = self._score_rollout(experience)
        for objective in self.objectives.values():
            objective.review(self.policy, experience, self.sampling.temperature)
        return experience

    def _demonstrated(self, prompts: PromptBatch, answers: Completions) -> Experience:
        """Return given answers as experience, without advantages."""
        groups = torch.arange(len(answers.mask))
        zeros = torch.zeros(len(groups), device=answers.mask.device)
        items, length = answers.mask.sum().double(), self.sampling.max_completion_length
        return Experience(prompts, groups, answers, zeros, zeros, answers.mask, items, length)

    def _loss_mask(self, rollout: Rollout, completions: Completions) -> Bool[Tensor, "responses length"]:
        """Return the mask of tokens that carry loss."""
        mask = completions.mask
        for objective in self.objectives.values():
            mask = objective.loss_mask(mask, completions.truncated)
        return mask if rollout.kept is None else mask & rollout.kept.to(mask.device)

    def _advantages(
        self, rewards: Float[Tensor, " responses"], sizes: Int[Tensor, " groups"]
    ) -> Float[Tensor, " responses"]:
        """Return group-relative advantages, an objective's own advantages, or zeros if no objective uses rewards."""
        if not self.learns_by_reward:
            return torch.zeros_like(rewards)
        for objective in self.objectives.values():
            advantages = objective.advantages(rewards, sizes, self.num_generations)
            if advantages is not None:
                return advantages
        everyones = group_advantages(gather_groups(rewards, self.num_generations), self.num_generations)
        return own_groups(everyones, self.num_generations)

    def _score(
        self, batch: Experience, times: int | Times, families: Any, actions: list[Action] | None = None
    ) -> Scores:
        """Score responses with the policy, recording the observations of the objectives in `families`.

        By default, the actions are those under which passes run.
        """
        if actions is None:
            actions = [action for action in batch.actions.values() if action.in_passes]
        with ExitStack() as stack:
            if not prefilled_once(actions):  # before the recorders, which then see gates as the actions left them
                stack.enter_context(reading(actions, self.policy.model, "response"))
                times, actions = 1, []
            seen = {
                family: stack.enter_context(self.objectives[family].observe(self.policy.model, times))
                for family in families
            }
            logps, entropy = completion_logps(
                self.policy.model, batch.prompts, batch.completions, self.sampling.temperature, times, actions
            )
        return Scores(logps, entropy, seen)

    @torch.no_grad()
    def _score_rollout(self, experience: Experience) -> Scores:
        """Score a rollout under the policy that sampled it, with the rollout's actions."""
        times = self.policy.shared_times(experience.times)
        return self._score(experience, times, self.compared, list(experience.actions.values()))

    def _loss(self, batch: Experience, scores: Scores, old: Scores) -> Float[Tensor, ""]:
        """Return the sum of the objectives' losses; its mean over ranks is the loss over all ranks' responses."""
        loss, tokens = scores.logps.new_zeros(()), batch.mask.sum()
        of_responses, of_tokens = global_mean_weights(torch.tensor(len(batch.mask), device=tokens.device), tokens)
        weight = {"responses": of_responses, "tokens": of_tokens, "processes": torch.ones_like(of_tokens)}
        for objective in self.objectives.values():
            own, metrics = objective.loss(self.policy, batch, scores, old, self.sampling.temperature)
            loss = loss + own * weight[objective.normaliser].to(loss.dtype)
            for name, value in metrics.items():
                self.meter.measure(f"{objective.prefix}{name}", value, tokens)
            for name, value in objective.metrics(batch).items():
                self.meter.measure(f"{objective.prefix}{name}", value)
        return loss

    def _measure_pass(self, batch: Experience, scores: Scores, first: bool) -> None:
        """Measure the entropy, and in a rollout's first pass the distance from its sampling."""
        generated = batch.completions.mask
        self.meter.measure("entropy", (scores.entropy * generated).sum() / generated.sum(), generated.sum())
        if first:
            self._measure_sampling(batch.sampled(), scores.logps.detach())

    def _measure_sampling(self, completions: Completions, logps: Float[Tensor, "responses length"]) -> None:
        """Measure the gap between training and sampling log-probabilities, under TRL's metric names."""
        difference = ((logps - completions.sampled_logps).abs() * completions.mask).detach()
        count = completions.mask.sum()
        self.meter.measure("sampling/sampling_logp_difference/mean", difference.sum() / count.clamp(min=1), count)
        self.meter.measure("sampling/sampling_logp_difference/max", difference.max())
