"""The hooks of a training objective.

A batch of prompts passes an objective in this order:

    prepare        once a run: check the policy, load frozen models
    act            choose something for every response before it is sampled (attention noise, an allocation)
    shape_rewards  change the rewards that responses learn from
    kept_tokens    leave responses or turns out of the loss
    refine         add responses to groups, outside environments
    loss_mask      leave responses out of the loss
    advantages     turn rewards into advantages
    review         read the rollout under frozen models
    observe        record the policy's passes
    loss           the loss and its metrics
    normaliser     the number that the loss is a mean over
    metrics        further metrics of an optimiser step
    settle         the choice that held-out prompts are answered with

The learner adds the objectives' losses. It asks for traits, never for a class. Objectives that learn from given answers
(`samples` is False) are asked for `loss`, `normaliser` and `metrics` only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybridmem.rl.attention.action import Action
from hybridmem.rl.rewards.functions import Rewards
from hybridmem.rl.rollouts.completions import Completions
from hybridmem.rl.rollouts.experience import Experience, Rollout, Scores
from hybridmem.rl.rollouts.policy import Example, Policy
from hybridmem.rl.rollouts.prompts import Prompt, Times

Normaliser = Literal["responses", "tokens", "processes"]
ModelLoader = Callable[[str], tuple[Any, PreTrainedTokenizerBase | None]]  # by name: a model and its tokenizer
LossAndMetrics = tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]


class ObjectiveError(Exception):
    """The reason, in one line, why an objective cannot continue."""


@runtime_checkable
class Refiner(Protocol):
    """The rollout worker as an objective sees it while it refines responses."""

    policy: Policy
    num_generations: int

    def answer_refinements(self, prompts: list[Prompt], places: Sequence[tuple[int, int]]) -> Completions:
        """Return one response to each prompt; `places` are (group, response within it)."""
        ...

    def reward(self, examples: list[Example], completions: Completions) -> tuple[list[str], Rewards]:
        """Return the texts of responses, one to each example, and their rewards."""
        ...

    def measure(self, name: str, value: Tensor | float, weight: Tensor | float | int = 1) -> None:
        """Log a mean over ranks by weight."""
        ...


class Objective(ABC):
    """A loss on a policy's responses; subclasses override the hooks they need."""

    family: ClassVar[str]  # a run has at most one objective of each; by default the class's name
    prefix: ClassVar[str] = ""  # of its metrics in the log
    learns_by_reward: ClassVar[bool] = False  # reads advantages
    samples: ClassVar[bool] = True  # learns from the policy's own responses, not from given answers
    alone: ClassVar[str | None] = None  # the reason why no other objective goes with it
    refines: ClassVar[bool] = False  # overrides `refine`
    compares_with_rollout: ClassVar[bool] = False  # its loss reads its observation of the sampling policy
    choice: ClassVar[str] = "exploration"  # the word for what `act` chooses
    chooses_in_environments: ClassVar[bool] = False  # `act` goes with environments
    dynamic_sampling: bool = False  # replaces groups without signal

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "family"):
            cls.family = cls.__name__

    @property
    def explores(self) -> bool:
        """Whether `act` chooses anything."""
        return False

    @property
    def splits_reading(self) -> bool:
        """Whether passes read prompts and responses in two parts, so that records hold the responses' queries alone."""
        return False

    @property
    def trains_head(self) -> bool:
        """Whether its gradient reaches the model's language-model head."""
        return True

    @property
    def trains_model(self) -> bool:
        """Whether its gradient reaches the model's weights; a model that no objective trains is frozen."""
        return True

    @property
    def reads_scores(self) -> bool:
        """Whether its loss reads the policy's passes over the responses."""
        return True

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        """Return optimiser groups of the parameters that the objective put into `policy.learned`."""
        return []

    def check_others(self, others: list["Objective"]) -> None:
        """Raise a ValueError if the objective lacks another that it needs."""

    def check_run(self, steps_per_rollout: int, num_generations: int) -> None:
        """Raise a ValueError if the objective cannot learn from so many optimiser steps and responses per rollout."""

    def prepare(self, policy: Policy, load: ModelLoader) -> None:
        """Check the policy, and put the models that the objective reads into `policy.frozen`.

        Args:
            policy: before adapters are added or weights sharded.
            load: loads further models.

        Raises:
            ValueError: the policy lacks something that the objective needs.
        """

    def act(self, policy: Policy, num_generations: int, time: int, generators: list[torch.Generator]) -> Action | None:
        """Choose something for every response before it is sampled.

        Args:
            policy: the model that will respond.
            num_generations: responses to each prompt.
            time: the most tokens of a prompt and its response; 0 in environments, where it is not known yet.
            generators: the random numbers of each prompt.
        """
        return None

    def shape_rewards(
        self, rewards: Float[Tensor, " responses"], turns: Int[Tensor, " responses"], max_turns: int
    ) -> Float[Tensor, " responses"] | None:
        """Return the rewards that responses learn from, or None to leave them."""
        return None

    def kept_tokens(
        self,
        rewards: Float[Tensor, " responses"],
        faulty: Bool[Tensor, "responses length"],
        num_generations: int,
    ) -> Bool[Tensor, "responses length"] | None:
        """Return the tokens that may carry loss, or None for all.

        Args:
            rewards: of each response, before shaping.
            faulty: tokens of turns whose calls failed; none outside environments.
            num_generations: responses of each group.
        """
        return None

    def refine(self, rollout: Rollout, examples: list[Example], texts: list[str], worker: Refiner) -> Rollout:
        """Return the rollout with further responses in its groups."""
        return rollout

    def advantages(
        self, rewards: Float[Tensor, " responses"], sizes: Int[Tensor, " groups"], num_generations: int
    ) -> Float[Tensor, " responses"] | None:
        """Return the advantages of this rank's responses, or None to take another objective's.

        Args:
            rewards: of this rank's responses, groups next to one another.
            sizes: responses of each group, refinements included.
            num_generations: responses of each group that were sampled.
        """
        return None

    def loss_mask(
        self, mask: Bool[Tensor, "responses length"], truncated: Bool[Tensor, " responses"]
    ) -> Bool[Tensor, "responses length"]:
        """Return the tokens that carry loss."""
        return mask

    def review(self, policy: Policy, experience: Experience, temperature: float) -> None:
        """Add to a rollout's experience the numbers that the loss reads of frozen models."""

    def observe(self, model: Any, times: int | Times) -> AbstractContextManager[Any]:
        """Return a context that records a pass of the policy; its value is the observation."""
        return nullcontext()

    @abstractmethod
    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the loss of some responses, and its metrics without gradient.

        Args:
            policy: the policy; models of `prepare` are in `policy.frozen`.
            batch: the responses.
            scores: the policy's pass over them.
            old: the pass of the policy that sampled them.
            temperature: of the sampling.
        """

    def settle(self, policy: Policy) -> Action | None:
        """Return the choice that held-out prompts are answered with, or None; its one row serves all responses."""
        return None

    @property
    def normaliser(self) -> Normaliser:
        """The number that the loss is a mean over, which weighs ranks: its responses, its tokens, or ranks alike."""
        return "tokens"

    def metrics(self, batch: Experience) -> dict[str, Float[Tensor, ""]]:
        """Return further metrics of an optimiser step's responses."""
        return {}
