"""Rollouts, scores and the experience that objectives learn from."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from hybridmem.rl.attention.action import Action

from .completions import Completions
from .prompts import Prompt, PromptBatch, Times


@dataclass
class Rollout:
    """Prompts, the responses to them, and their rewards."""

    prompts: list[Prompt]  # one per group
    completions: Completions
    rewards: Float[Tensor, " responses"]
    actions: dict[str, Action] = field(default_factory=dict)  # by objective family
    sizes: Int[Tensor, " groups"] | None = None  # number of responses per group; None: num_generations
    refined: Bool[Tensor, " responses"] | None = None  # True for refinements, which were sampled from another prompt
    kept: Bool[Tensor, "responses length"] | None = None  # tokens that may carry loss; None: all sampled tokens


class Scores(NamedTuple):
    """Scores of responses from one forward pass of a policy."""

    logps: Float[Tensor, "responses length"]
    entropy: Float[Tensor, "responses length"]
    seen: dict[str, Any]  # the objectives' observations of the pass, by family

    def detach(self, families: Collection[str]) -> "Scores":
        """Return detached scores, with the observations of the given families only."""
        seen = {name: seen.detach() for name, seen in self.seen.items() if name in families}
        return Scores(self.logps.detach(), self.entropy, seen)

    def select(self, rows: Int[Tensor, " rows"]) -> "Scores":
        """Return the scores of the selected responses."""
        seen = {name: seen.select(rows) for name, seen in self.seen.items()}
        return Scores(self.logps[rows], self.entropy[rows], seen)


@dataclass
class Experience:
    """A rollout as the tensors that objectives read."""

    prompts: PromptBatch  # one per response
    group_of: Int[Tensor, " responses"]  # group index; a group's responses are adjacent
    completions: Completions
    rewards: Float[Tensor, " responses"]
    advantages: Float[Tensor, " responses"]
    mask: Bool[Tensor, "responses length"]  # tokens that carry loss
    num_items: Float[Tensor, ""]  # the rollout's tokens that carry loss, divided by the steps per pass over it
    max_completion_length: int
    old: Scores | None = None  # under the sampling policy; None: taken from the first pass, or not needed
    ref_logps: Float[Tensor, "responses length"] | None = None
    actions: dict[str, Action] = field(default_factory=dict)
    refined: Bool[Tensor, " responses"] | None = None

    @property
    def times(self) -> int | Times:
        """Return the number of responses per prompt: an integer, or one number per group if group sizes differ."""
        _, counts = self.group_of.unique_consecutive(return_counts=True)
        return int(counts[0]) if (counts == counts[0]).all() else counts

    def sampled(self) -> Completions:
        """Return the responses, with an empty mask for refinements, which were sampled from another prompt."""
        completions = self.completions
        if self.refined is None:
            return completions
        return completions._replace(mask=completions.mask & ~self.refined[:, None])

    def select(self, rows: Int[Tensor, " rows"]) -> "Experience":
        """Return the experience of the selected responses."""
        return Experience(
            self.prompts.select(rows),
            self.group_of[rows],
            Completions(*(x[rows] for x in self.completions)),
            self.rewards[rows],
            self.advantages[rows],
            self.mask[rows],
            self.num_items,
            self.max_completion_length,
            None if self.old is None else self.old.select(rows),
            None if self.ref_logps is None else self.ref_logps[rows],
            {name: action.select(rows) for name, action in self.actions.items()},
            None if self.refined is None else self.refined[rows],
        )
