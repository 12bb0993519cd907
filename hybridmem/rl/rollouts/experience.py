"""What a policy did, what it earned, and what there is to learn from it."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from hybridmem.data.vision import Prompt
from hybridmem.rl.attention.exploration import Noise
from hybridmem.rl.attention.recorder import LayerRecord
from hybridmem.tasks.task import Task, exact_match

from .sampling import Completions, PromptBatch, Times

T = TypeVar("T")


@dataclass
class Rollout:
    """Prompts, the responses to them, and what they earned."""

    prompts: list[Prompt]  # of each group
    completions: Completions
    rewards: Float[Tensor, " responses"]
    noise: Noise | None = None  # that the responses were sampled under
    sizes: Int[Tensor, " groups"] | None = None  # responses of each group; None: num_generations
    refined: Bool[Tensor, " responses"] | None = None  # answers to a critique, sampled behind another prompt
    kept: Bool[Tensor, "responses length"] | None = None  # tokens that may carry loss; None: all that were sampled


class Scores(NamedTuple):
    """What a policy makes of responses."""

    logps: Float[Tensor, "responses length"]
    entropy: Float[Tensor, "responses length"]
    records: dict[int, LayerRecord]

    def detach(self) -> "Scores":
        """The same without a graph."""
        return Scores(self.logps.detach(), self.entropy, {n: record.detach() for n, record in self.records.items()})

    def select(self, rows: Int[Tensor, " rows"]) -> "Scores":
        """Those of some responses."""
        records = {n: record.select(rows) for n, record in self.records.items()}
        return Scores(self.logps[rows], self.entropy[rows], records)


@dataclass
class Answered:
    """Held-out examples, what the policy answers them, and whether that is right.

    `sampled` are as many responses to each example as the policy's groups have, those of an example side by side.
    What is right is empty for tasks without answers.
    """

    examples: list[dict[str, Any]]
    greedy: list[str]
    sampled: list[str]
    greedy_right: list[bool] = field(default_factory=list)
    sampled_right: list[bool] = field(default_factory=list)

    @property
    def times(self) -> int:
        """How many responses to each example were sampled."""
        return len(self.sampled) // len(self.examples)

    def by_example(self, of_samples: list[T]) -> list[list[T]]:
        """What there is of every sampled response, a list for each example."""
        return [of_samples[start : start + self.times] for start in range(0, len(of_samples), self.times)]

    def judged(self, task: Task) -> "Answered":
        """The same with what is right: what `task.is_right` says, or the very answer for tasks that say nothing."""
        judge = getattr(task, "is_right", None) or _is_answer
        answers = [example["answer"] for example in self.examples]
        repeated = [answer for answer in answers for _ in range(self.times)]
        return replace(self, greedy_right=judge(self.greedy, answers), sampled_right=judge(self.sampled, repeated))


def _is_answer(completions: list[str], answers: list[str]) -> list[bool]:
    return [score == 1 for score in exact_match(completions, answers)]


@dataclass
class Experience:
    """A rollout as the objectives take it."""

    prompts: PromptBatch  # of each response
    group_of: Int[Tensor, " responses"]  # the number of its group, whose responses stand next to one another
    completions: Completions
    advantages: Float[Tensor, " responses"]
    mask: Bool[Tensor, "responses length"]  # the tokens that carry loss
    num_items: Float[Tensor, ""]  # such tokens in the whole rollout, for each step of a pass
    old: Scores | None = None  # of the policy that sampled; None: its first pass gives them, or no objective needs them
    ref_logps: Float[Tensor, "responses length"] | None = None
    noise: Noise | None = None
    refined: Bool[Tensor, " responses"] | None = None

    @property
    def times(self) -> int | Times:
        """How many responses next to one another share a prompt; a number each where they are not as many."""
        _, counts = self.group_of.unique_consecutive(return_counts=True)
        return int(counts[0]) if (counts == counts[0]).all() else counts

    def sampled(self) -> Completions:
        """The responses, without the tokens of those that were sampled behind another prompt."""
        completions = self.completions
        if self.refined is None:
            return completions
        return completions._replace(mask=completions.mask & ~self.refined[:, None])

    def select(self, rows: Int[Tensor, " rows"]) -> "Experience":
        """That of some responses."""
        return Experience(
            self.prompts.select(rows),
            self.group_of[rows],
            Completions(*(x[rows] for x in self.completions)),
            self.advantages[rows],
            self.mask[rows],
            self.num_items,
            None if self.old is None else self.old.select(rows),
            None if self.ref_logps is None else self.ref_logps[rows],
            None if self.noise is None else {n: eps[rows] for n, eps in self.noise.items()},
            None if self.refined is None else self.refined[rows],
        )
