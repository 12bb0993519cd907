"""Critique-GRPO (arXiv 2506.03106): where all responses fail, the policy answers again with a critique before it.

Of a prompt whose n responses all failed, each response is refined under its critique, and k refinements, right ones
first, join the group. Over all n + k responses A = R − mean(R). Tokens of the n have GRPO's clipped ratio, of the k

    −ρ A,  ρ = π / (π + γ)

with π the policy's probability of the token behind the *original* prompt. The weight of ∇ log π, γπ / (π + γ)², is
largest at π = γ: right tokens that the policy finds unlikely learn most, and what it knows is left alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hybridmem.checks import at_least, one_of
from hybridmem.rl.rewards.critics import Critic, fields_of

from .token import DrGRPO, group_advantages

TEMPLATE = (
    "{prompt}\n\nAn earlier response:\n{response}\n\nA critique of it:\n{critique}\n\n"
    "Answer again, without its mistakes.\n"
)
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
        refine: `failed`: groups in which every response failed; `all`: every group.
        join: `union`: refinements are added to the group; `replace`: they take the place of its first responses.

    Raises:
        ValueError: a value that cannot work.
    """

    critic: Critic
    num_refinements: int = 1
    gamma: float = 0.1
    correct_reward: float = 1.0
    template: str = TEMPLATE
    refine: str = "failed"
    join: str = "union"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, num_refinements=self.num_refinements)
        one_of(("failed", "all"), refine=self.refine)
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
        return ~correct.any(1) if self.refine == "failed" else torch.ones_like(correct[:, 0])

    def advantages(self, rewards: Float[Tensor, " responses"], sizes: Sequence[int]) -> Float[Tensor, " responses"]:
        """R − mean of each group, divided as scale_rewards says; `sizes` are the groups' responses."""
        groups = rewards.split(list(sizes))
        return torch.cat([group_advantages(group, len(group), self.scale_rewards) for group in groups])


@dataclass(frozen=True, kw_only=True)
class CritiqueGRPOReleased(CritiqueGRPO):
    """Critique-GRPO as the authors' released code has it: always refines, replaces, and divides by the deviation."""

    scale_rewards: str = "group"
    refine: str = "all"
    join: str = "replace"


def shaped(logps: Float[Tensor, "responses length"], gamma: float) -> Float[Tensor, "responses length"]:
    """ρ = π / (π + γ), in (0, 1 / (1 + γ)]."""
    return torch.sigmoid(logps - math.log(gamma))
