"""Rollouts, and the experience that objectives learn from."""

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

    prompts: list[Prompt]  # of each group
    completions: Completions
    rewards: Float[Tensor, " responses"]
    actions: dict[str, Action] = field(default_factory=dict)  # by the objective's family
    sizes: Int[Tensor, " groups"] | None = None  # responses of each group; None: num_generations
    refined: Bool[Tensor, " responses"] | None = None  # answers to a critique, sampled behind another prompt
    kept: Bool[Tensor, "responses length"] | None = None  # tokens that may carry loss; None: all sampled tokens


class Scores(NamedTuple):
    """One pass of a policy over responses."""

    logps: Float[Tensor, "responses length"]
    entropy: Float[Tensor, "responses length"]
    seen: dict[str, Any]  # each objective's observation of the pass, by its family

    def detach(self, families: Collection[str]) -> "Scores":
        """Return the pass without a graph, with the observations of some objectives."""
        seen = {name: seen.detach() for name, seen in self.seen.items() if name in families}
        return Scores(self.logps.detach(), self.entropy, seen)

    def select(self, rows: Int[Tensor, " rows"]) -> "Scores":
        """Return the scores of some responses."""
        seen = {name: seen.select(rows) for name, seen in self.seen.items()}
        return Scores(self.logps[rows], self.entropy[rows], seen)


@dataclass
class Experience:
    """A rollout as tensors that objectives read."""

    prompts: PromptBatch  # of each response
    group_of: Int[Tensor, " responses"]  # the number of its group, whose responses stand next to one another
    completions: Completions
    rewards: Float[Tensor, " responses"]
    advantages: Float[Tensor, " responses"]
    mask: Bool[Tensor, "responses length"]  # the tokens that carry loss
    num_items: Float[Tensor, ""]  # such tokens in the whole rollout, for each step of a pass
    max_completion_length: int
    old: Scores | None = None  # under the sampling policy; None: the first pass gives them, or nothing needs them
    ref_logps: Float[Tensor, "responses length"] | None = None
    actions: dict[str, Action] = field(default_factory=dict)
    refined: Bool[Tensor, " responses"] | None = None

    @property
    def times(self) -> int | Times:
        """The number of adjacent responses that share a prompt; one number per group if groups differ in size."""
        _, counts = self.group_of.unique_consecutive(return_counts=True)
        return int(counts[0]) if (counts == counts[0]).all() else counts

    def sampled(self) -> Completions:
        """Return the responses, with an empty mask for those that were sampled behind another prompt."""
        completions = self.completions
        if self.refined is None:
            return completions
        return completions._replace(mask=completions.mask & ~self.refined[:, None])

    def select(self, rows: Int[Tensor, " rows"]) -> "Experience":
        """Return the experience of some responses."""
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
