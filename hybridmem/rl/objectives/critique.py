"""Critique-GRPO (arXiv 2506.03106): the policy refines failed responses with the help of critiques.

If all n responses to a prompt fail, the policy refines each of them given its critique. The best k refinements join
the group, and A = R − mean(R) over all n + k responses. Tokens of the n initial responses have GRPO's clipped loss;
tokens of the k refinements have

    −ρ A,  ρ = π / (π + γ)

with π the policy's probability of the token after the *original* prompt. The weight of ∇ log π, γπ / (π + γ)², peaks
at π = γ: correct but unlikely tokens are reinforced most, and tokens that are already likely hardly change.
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
    """Critique-GRPO as published: no division by standard deviation or length, and no KL penalty.

    Args:
        critic: critiques responses (see hybridmem.rl.rewards.critics).
        num_refinements: k, the number of refinements that join a group.
        gamma: γ in the shaping ρ.
        correct_reward: responses with a lower reward count as failed.
        template: format string of the refinement prompt, with the fields {prompt}, {response} and {critique}.
        refine_groups: `failed` refines groups in which every response failed; `all` refines every group.
        join: `union` adds the refinements to the group; `replace` puts them in place of its first responses.

    Raises:
        ValueError: A setting is out of range, or contradicts another one.
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
            raise ValueError(f"gamma={self.gamma} must be positive and finite, or refinements get no gradient")
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} does not apply to refinements, whose "
                "loss is per token; set it to token"
            )
        if self.dynamic_sampling:
            raise ValueError(
                "dynamic_sampling=True replaces the failed groups that CritiqueGRPO refines; set dynamic_sampling=False"
            )
        missing, unknown = FIELDS - (named := fields_of("template", self.template)), named - FIELDS
        if "prompt" in missing or "critique" in missing or unknown:
            raise ValueError(
                f"template={self.template!r} must contain {{prompt}} and {{critique}}, optionally {{response}}, and no "
                "other field"
            )

    def policy_loss(
        self,
        ratio: Float[Tensor, "responses #length"],
        logps: Float[Tensor, "responses length"],
        advantages: Float[Tensor, "responses 1"],
        refined: Bool[Tensor, " responses"] | None = None,
    ) -> tuple[Float[Tensor, "responses #length"], dict[str, Bool[Tensor, "responses #length"]]]:
        """Return GRPO's loss for sampled responses and −ρ A for refinements."""
        loss, clipped = super().policy_loss(ratio, logps, advantages)
        if refined is None:
            return loss, clipped
        rows = refined[:, None]
        loss = torch.where(rows, -shaped(logps, self.gamma) * advantages, loss)
        return loss, {name: where & ~rows for name, where in clipped.items()}

    def to_refine(self, correct: Bool[Tensor, "groups num_generations"]) -> Bool[Tensor, " groups"]:
        """Return a mask of the groups to refine."""
        return ~correct.any(1) if self.refine_groups == "failed" else torch.ones_like(correct[:, 0])

    def advantages(
        self, rewards: Float[Tensor, " responses"], sizes: Int[Tensor, " groups"], num_generations: int
    ) -> Float[Tensor, " responses"]:
        """Return R − mean of each group, refinements included, divided according to scale_rewards."""
        groups = rewards.split(sizes.tolist())
        return torch.cat([group_advantages(group, len(group), self.scale_rewards) for group in groups])

    @torch.no_grad()
    def refine(self, rollout: Rollout, examples: list[Example], texts: list[str], worker: Refiner) -> Rollout:
        """Refine the groups that `to_refine` selects, and add the best refinements or replace first responses by them.

        Logs under critique/: the share of groups that were refined, the share of those that got a correct refinement,
        the number of refinements sampled, and the number of responses without a critique or too long for one.
        """
        times = worker.num_generations
        correct = rollout.rewards >= self.correct_reward
        groups = self.to_refine(correct.view(-1, times))
        rows = groups.repeat_interleave(times).nonzero().squeeze(1).tolist()
        asked = self._ask_again(worker, examples, texts, correct, rows)
        worker.measure("critique/refined_groups", groups.float().mean())
        _, size = rank_and_size()  # `measure` averages over ranks; times the number of ranks, that is the sum
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
        """Return the row of each response that can be refined, with its refinement prompt."""
        if not rows:
            return []
        repeated = [examples[row // worker.num_generations] for row in rows]
        columns = {name: [example[name] for example in repeated] for name in repeated[0] if name != "prompt"}
        critiques = self.critic(
            prompts=[example["prompt"] for example in repeated],
            completions=[texts[row] for row in rows],
            correct=correct[rows].tolist(),
            **columns,
        )
        if len(critiques) != len(rows):
            raise ValueError(
                f"the critic returned {len(critiques)} critiques for {len(rows)} responses; it must return one each"
            )
        asked = []
        for row, example, critique in zip(rows, repeated, critiques, strict=True):
            if critique is None:
                continue
            text = self.template.format(prompt=example["prompt"], response=texts[row], critique=critique)
            try:
                asked.append((row, worker.policy.data.prompt({**example, "prompt": text})))
            except ValueError as error:  # longer than max_prompt_length
                logger.warning("skipping the refinement of a response: %s", error)
        return asked


@dataclass(frozen=True, kw_only=True)
class CritiqueGRPOReleased(CritiqueGRPO):
    """Critique-GRPO as in the authors' code: refine every group, replace responses, divide by standard deviation."""

    scale_rewards: str = "group"
    refine_groups: str = "all"
    join: str = "replace"


def shaped(logps: Float[Tensor, "responses length"], gamma: float) -> Float[Tensor, "responses length"]:
    """Return ρ = π / (π + γ), which lies in (0, 1 / (1 + γ)]."""
    return torch.sigmoid(logps - math.log(gamma))


def best_of_groups(rewards: Tensor, group_of: Int[Tensor, " responses"], count: int) -> Int[Tensor, " chosen"]:
    """Return the rows of each group's `count` highest rewards, group by group; ties keep their order."""
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
    """Merge a rollout, in groups of `times`, with the refinements of some groups; keep the order of the groups."""
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
