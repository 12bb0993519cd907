"""Critique-GRPO (arXiv 2506.03106): where all responses fail, the policy answers again with a critique before it.

Of a prompt whose n responses all failed, each response is refined under its critique, and k refinements, right ones
first, join the group. Over all n + k responses A = R − mean(R). Tokens of the n have GRPO's clipped ratio, of the k

    −ρ A,  ρ = π / (π + γ)

with π the policy's probability of the token behind the *original* prompt. The weight of ∇ log π, γπ / (π + γ)², is
largest at π = γ: right tokens that the policy finds unlikely learn most, and what it knows is left alone.
"""

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hybridmem.checks import at_least, one_of
from hybridmem.distributed import rank_and_size
from hybridmem.rl.rewards.critics import Critic, fields_of
from hybridmem.rl.rollouts.completions import Completions, concatenate
from hybridmem.rl.rollouts.experience import Rollout
from hybridmem.rl.rollouts.policy import Example
from hybridmem.rl.rollouts.prompts import Prompt

from .advantages import group_advantages
from .objective import Refiner
from .token import DrGRPO

TEMPLATE = (
    "{prompt}\n\nAn earlier response:\n{response}\n\nA critique of it:\n{critique}\n\n"
    "Answer again, without its mistakes.\n"
)
logger = logging.getLogger(__name__)
FIELDS = {"prompt", "response", "critique"}


@dataclass(frozen=True, kw_only=True)
class CritiqueGRPO(DrGRPO):
    """Critique-GRPO as its paper has it: no deviation, no length, no KL.

    Args:
        critic: says what is wrong with responses (see hybridmem.rl.rewards.critics).
        num_refinements: k, how many refinements join a group.
        gamma: γ of the shaping ρ.
        correct_reward: a response with a lower reward has failed.
        template: of the prompt that a refinement answers, with {prompt}, {response} and {critique}.
        refine_groups: `failed`: groups in which every response failed; `all`: every group.
        join: `union`: refinements are added to the group; `replace`: they take the place of its first responses.

    Raises:
        ValueError: a value that cannot work.
    """

    refines: ClassVar[bool] = True

    critic: Critic
    num_refinements: int = 1
    gamma: float = 0.1
    correct_reward: float = 1.0
    template: str = TEMPLATE
    refine_groups: str = "failed"
    join: str = "union"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, num_refinements=self.num_refinements)
        one_of(("failed", "all"), refine_groups=self.refine_groups)
        one_of(("union", "replace"), join=self.join)
        one_of(("none", "group"), scale_rewards=self.scale_rewards)
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma={self.gamma} must be above 0: without it refinements would have no gradient")
        if self.importance_sampling_level != "token":
            raise ValueError("importance_sampling_level must be token: refinements are shaped token by token")
        if self.dynamic_sampling:
            raise ValueError("dynamic_sampling drops the groups that failed, which CritiqueGRPO refines: set it off")
        missing, unknown = FIELDS - (named := fields_of("template", self.template)), named - FIELDS
        if "prompt" in missing or "critique" in missing or unknown:
            raise ValueError(
                f"template={self.template!r} must name {{prompt}} and {{critique}}, may name {{response}}, and no other"
            )

    def policy_loss(
        self,
        ratio: Float[Tensor, "responses #length"],
        logps: Float[Tensor, "responses length"],
        advantages: Float[Tensor, "responses 1"],
        refined: Bool[Tensor, " responses"] | None = None,
    ) -> tuple[Float[Tensor, "responses #length"], dict[str, Bool[Tensor, "responses #length"]]]:
        """GRPO's, and −ρ A for the responses that are refinements."""
        loss, clipped = super().policy_loss(ratio, logps, advantages)
        if refined is None:
            return loss, clipped
        rows = refined[:, None]
        loss = torch.where(rows, -shaped(logps, self.gamma) * advantages, loss)
        return loss, {name: where & ~rows for name, where in clipped.items()}

    def to_refine(self, correct: Bool[Tensor, "groups num_generations"]) -> Bool[Tensor, " groups"]:
        """Which groups are refined."""
        return ~correct.any(1) if self.refine_groups == "failed" else torch.ones_like(correct[:, 0])

    def advantages(
        self, rewards: Float[Tensor, " responses"], sizes: Int[Tensor, " groups"], num_generations: int
    ) -> Float[Tensor, " responses"]:
        """Return R − mean of each group, refinements included, divided as scale_rewards says."""
        groups = rewards.split(sizes.tolist())
        return torch.cat([group_advantages(group, len(group), self.scale_rewards) for group in groups])

    @torch.no_grad()
    def refine(self, rollout: Rollout, examples: list[Example], texts: list[str], worker: Refiner) -> Rollout:
        """Add refinements after each group that `to_refine` names, or put them in its first places.

        Measures, under critique/: the share of groups that were refined, of these the share with a right refinement,
        the number of refinements, and the number of responses without a critique or without room for one.
        """
        times = worker.num_generations
        correct = rollout.rewards >= self.correct_reward
        groups = self.to_refine(correct.view(-1, times))
        rows = groups.repeat_interleave(times).nonzero().squeeze(1).tolist()
        asked = self._ask_again(worker, examples, texts, correct, rows)
        worker.measure("critique/refined_groups", groups.float().mean())
        _, size = rank_and_size()  # the mean over ranks of size times a count is the sum
        worker.measure("critique/unrefined", float(size * (len(rows) - len(asked))))
        worker.measure("critique/sampled", float(size * len(asked)))
        if not asked:
            return rollout
        refinements = worker.answer_refinements(
            [prompt for _, prompt in asked], [(row // times, row % times) for row, _ in asked]
        )
        group_of = torch.tensor([row // times for row, _ in asked])
        _, rewards = worker.reward([examples[group] for group in group_of.tolist()], refinements)
        chosen = best_of_groups(rewards.total, group_of, self.num_refinements)
        right = group_of[rewards.total >= self.correct_reward].unique()
        worker.measure("critique/rescued_groups", len(right) / int(groups.sum()), int(groups.sum()))
        kept = Completions(*(x[chosen.to(x.device)] for x in refinements))
        earned, pad_id = rewards.total[chosen], worker.policy.data.pad_id
        return joined(rollout, kept, earned, group_of[chosen], self.join, times, pad_id)

    def _ask_again(
        self, worker: Refiner, examples: list[Example], texts: list[str], correct: Tensor, rows: list[int]
    ) -> list[tuple[int, Prompt]]:
        """Return the responses that can be refined, each with the prompt that asks for it."""
        if not rows:
            return []
        repeated = [examples[row // worker.num_generations] for row in rows]
        columns = {name: [example[name] for example in repeated] for name in repeated[0] if name != "prompt"}
        critiques = self.critic(
            prompts=[example["prompt"] for example in repeated], completions=[texts[row] for row in rows],
            correct=correct[rows].tolist(), **columns,
        )  # fmt: skip
        if len(critiques) != len(rows):
            raise ValueError(
                f"the critic gave {len(critiques)} critiques for {len(rows)} responses; it must give one each"
            )
        asked = []
        for row, example, critique in zip(rows, repeated, critiques, strict=True):
            if critique is None:
                continue
            text = self.template.format(prompt=example["prompt"], response=texts[row], critique=critique)
            try:
                asked.append((row, worker.policy.data.prompt({**example, "prompt": text})))
            except ValueError as error:  # longer than max_prompt_length
                logger.warning("a response is not refined: %s", error)
        return asked


@dataclass(frozen=True, kw_only=True)
class CritiqueGRPOReleased(CritiqueGRPO):
    """Critique-GRPO as the authors' released code has it: always refines, replaces, and divides by the deviation."""

    scale_rewards: str = "group"
    refine_groups: str = "all"
    join: str = "replace"


def shaped(logps: Float[Tensor, "responses length"], gamma: float) -> Float[Tensor, "responses length"]:
    """ρ = π / (π + γ), in (0, 1 / (1 + γ)]."""
    return torch.sigmoid(logps - math.log(gamma))


def best_of_groups(rewards: Tensor, group_of: Int[Tensor, " responses"], count: int) -> Int[Tensor, " chosen"]:
    """The rows of each group's `count` highest rewards, earlier ones first among equals, in the order of the groups."""
    order = rewards.argsort(descending=True, stable=True)
    order = order[group_of[order].argsort(stable=True)]
    groups = group_of[order]
    first = torch.searchsorted(groups, groups)
    return order[torch.arange(len(order)) - first < count]


def joined(
    rollout: Rollout,
    refinements: Completions,
    rewards: Tensor,
    group_of: Int[Tensor, " refinements"],
    join: str,
    times: int,
    pad_id: int,
) -> Rollout:
    """A rollout of groups of `times` and the refinements of some, in the order of the groups."""
    initial = torch.arange(len(rollout.rewards)) // times
    kept = torch.ones(len(initial), dtype=torch.bool)
    if join == "replace":
        place = torch.arange(len(group_of)) - torch.searchsorted(group_of, group_of)
        kept[group_of * times + place] = False
    whole = concatenate([Completions(*(x[kept.to(x.device)] for x in rollout.completions)), refinements], pad_id)
    groups = torch.cat((initial[kept], group_of))
    refined: Bool[Tensor, " responses"] = torch.arange(len(groups)) >= int(kept.sum())
    order = groups.argsort(stable=True)
    return Rollout(
        rollout.prompts,
        Completions(*(x[order.to(x.device)] for x in whole)),
        torch.cat((rollout.rewards[kept], rewards))[order],
        sizes=groups.bincount(minlength=len(rollout.prompts)),
        refined=refined[order],
    )
