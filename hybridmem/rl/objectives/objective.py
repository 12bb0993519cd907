"""Hooks of a training objective.

The trainer calls an objective's hooks in this order:

    prepare        once per run: check the policy, load frozen models
    contrast       choose the most different actions, under which rewards that never differ stop a run before it trains
    act            choose an action for every response before it is sampled (attention noise, an allocation)
    shape_rewards  change the rewards from which advantages are computed
    kept_tokens    exclude responses or turns from the loss
    refine         add responses to groups; not in environments
    loss_mask      exclude responses from the loss
    advantages     turn rewards into advantages
    review         score the rollout under frozen models
    observe        record the policy's forward passes
    loss           compute the loss and its metrics
    normaliser     name the quantity over which the loss is averaged
    metrics        compute further metrics of an optimiser step
    settle         choose the action under which held-out prompts are answered

The learner adds the objectives' losses. It reads traits and never checks a class. Objectives that learn from given
answers (`samples` is False) only need `loss`, `normaliser` and `metrics`.
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
ModelLoader = Callable[[str], tuple[Any, PreTrainedTokenizerBase | None]]  # loads a model and its tokenizer by name
LossAndMetrics = tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]


class ObjectiveError(Exception):
    """The reason, in one line, why an objective cannot continue."""


@runtime_checkable
class Refiner(Protocol):
    """Interface of the rollout worker for objectives that refine responses."""

    policy: Policy
    num_generations: int

    def answer_refinements(self, prompts: list[Prompt], places: Sequence[tuple[int, int]]) -> Completions:
        """Return one response to each prompt; `places` are pairs (group, response within the group)."""
        ...

    def reward(self, examples: list[Example], completions: Completions) -> tuple[list[str], Rewards]:
        """Return the texts and the rewards of responses, one response per example."""
        ...

    def measure(self, name: str, value: Tensor | float, weight: Tensor | float | int = 1) -> None:
        """Log a metric as its weighted mean over ranks."""
        ...


class Objective(ABC):
    """Loss on a policy's responses; subclasses override the hooks they need."""

    family: ClassVar[str]  # a run has at most one objective per family; defaults to the class name
    prefix: ClassVar[str] = ""  # prepended to the names of its metrics
    learns_by_reward: ClassVar[bool] = False  # uses advantages
    samples: ClassVar[bool] = True  # learns from the policy's own responses instead of given answers
    learns: ClassVar[bool] = True  # False: only fixes a choice, which `hybridmem validate` measures
    alone: ClassVar[str | None] = None  # the reason why it cannot be combined with other objectives
    refines: ClassVar[bool] = False  # overrides `refine`
    compares_with_rollout: ClassVar[bool] = False  # its loss needs an observation of the sampling policy
    choice: ClassVar[str] = "exploration"  # names the action in messages
    chooses_in_environments: ClassVar[bool] = False  # `act` supports environments
    init_from: str | None = None  # checkpoint from which its own parameters start
    dynamic_sampling: bool = False  # replaces groups whose rewards are all equal

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "family"):
            cls.family = cls.__name__

    @property
    def explores(self) -> bool:
        """Return True if `act` chooses an action."""
        return False

    @property
    def splits_reading(self) -> bool:
        """Return True if passes read prompt and response separately, so records hold only responses' queries."""
        return False

    @property
    def trains_head(self) -> bool:
        """Return True if the loss has a gradient with respect to the LM head."""
        return True

    @property
    def trains_model(self) -> bool:
        """Return True if the loss trains the model's weights; a model that no objective trains is frozen."""
        return True

    @property
    def reads_scores(self) -> bool:
        """Return True if the loss reads the policy's scores of the responses."""
        return True

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        """Return optimiser groups of the parameters that the objective put into `policy.learned`."""
        return []

    def check_others(self, others: list["Objective"]) -> None:
        """Raise a ValueError if the objective lacks another that it needs."""

    def check_run(self, steps_per_rollout: int, num_generations: int) -> None:
        """Raise a ValueError if the objective cannot learn with this number of steps and responses per rollout."""

    def prepare(self, policy: Policy, load: ModelLoader) -> None:
        """Check the policy, and store the frozen models that the objective needs in `policy.frozen`.

        Args:
            policy: the policy, before adapters are added or weights are sharded.
            load: loads further models by name.

        Raises:
            ValueError: The policy does not meet the objective's requirements.
        """

    def act(self, policy: Policy, num_generations: int, time: int, generators: list[torch.Generator]) -> Action | None:
        """Choose an action for every response before it is sampled, or None.

        Args:
            policy: the policy that will respond.
            num_generations: the number of responses to each prompt.
            time: the maximum number of tokens of a prompt and its response; 0 in environments, where it is unknown.
            generators: one random generator per prompt.
        """
        return None

    def contrast(self, policy: Policy, num_prompts: int, num_generations: int) -> Action | None:
        """Choose the most different actions for the responses to each prompt, or None.

        A run in which the responses to many prompts all earn one reward under them does not begin.
        """
        return None

    def shape_rewards(
        self, rewards: Float[Tensor, " responses"], turns: Int[Tensor, " responses"], max_turns: int
    ) -> Float[Tensor, " responses"] | None:
        """Return the rewards from which advantages are computed, or None to keep them unchanged."""
        return None

    def kept_tokens(
        self,
        rewards: Float[Tensor, " responses"],
        faulty: Bool[Tensor, "responses length"],
        num_generations: int,
    ) -> Bool[Tensor, "responses length"] | None:
        """Return a mask of the tokens that may carry loss, or None for all tokens.

        Args:
            rewards: one reward per response, before shaping.
            faulty: tokens of turns whose tool calls failed; all False outside environments.
            num_generations: the number of responses in each group.
        """
        return None

    def refine(self, rollout: Rollout, examples: list[Example], texts: list[str], worker: Refiner) -> Rollout:
        """Return the rollout with refined responses in its groups."""
        return rollout

    def advantages(
        self, rewards: Float[Tensor, " responses"], sizes: Int[Tensor, " groups"], num_generations: int
    ) -> Float[Tensor, " responses"] | None:
        """Return the advantages of this rank's responses, or None to use another objective's.

        Args:
            rewards: the rewards of this rank's responses, one group after the other.
            sizes: the number of responses in each group, refinements included.
            num_generations: the number of responses sampled per group, without refinements.
        """
        return None

    def loss_mask(
        self, mask: Bool[Tensor, "responses length"], truncated: Bool[Tensor, " responses"]
    ) -> Bool[Tensor, "responses length"]:
        """Return a mask of the tokens that carry loss; `truncated` marks responses that were cut off."""
        return mask

    def review(self, policy: Policy, experience: Experience, temperature: float) -> None:
        """Score the rollout under frozen models, and store the scores that the loss needs in the experience."""

    def observe(self, model: Any, times: int | Times) -> AbstractContextManager[Any]:
        """Return a context manager that records a forward pass of the policy and yields the observation."""
        return nullcontext()

    @abstractmethod
    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the loss of some responses and its detached metrics.

        Args:
            policy: the policy; `policy.frozen` holds the models that `prepare` loaded.
            batch: the responses.
            scores: the policy's scores of the responses.
            old: the sampling policy's scores of the responses.
            temperature: the sampling temperature.
        """

    def artefacts(self, policy: Policy) -> dict[str, Any]:
        """Return entries for checkpoints, as plain values that an export can use."""
        return {}

    def settle(self, policy: Policy) -> Action | None:
        """Return the choice that held-out prompts are answered with, or None; its one row serves all responses."""
        return None

    @property
    def normaliser(self) -> Normaliser:
        """Return the quantity that weights each rank's loss: its responses, its tokens, or all ranks equally."""
        return "tokens"

    def metrics(self, batch: Experience) -> dict[str, Float[Tensor, ""]]:
        """Return further metrics of the responses of an optimiser step."""
        return {}
