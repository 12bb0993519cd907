"""Objectives without advantages: supervised fine-tuning and rejection fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy

from .objective import LossAndMetrics, Objective


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """Supervised fine-tuning on given answers, the baseline for training by reward."""

    family: ClassVar[str] = "SFT"
    samples: ClassVar[bool] = False
    alone: ClassVar[str | None] = "learns from given answers and samples no responses"

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the loss of the answers (see `compute_loss`)."""
        return self.compute_loss(scores.logps, batch.mask), {}

    def compute_loss(
        self, logps: Float[Tensor, "responses length"], mask: Bool[Tensor, "responses length"]
    ) -> Float[Tensor, ""]:
        """Return the mean negative log-probability of the answers' tokens, including EOS."""
        return -(logps * mask).sum() / mask.sum()


@dataclass(frozen=True, kw_only=True)
class RejectionFineTune(Objective):
    """Rejection fine-tuning: learn solved trajectories without the turns whose calls failed (arXiv 2508.03501).

    Args:
        min_reward: the minimum reward of a trajectory to learn from.
    """

    family: ClassVar[str] = "RejectionFineTune"
    prefix: ClassVar[str] = "rejection/"
    alone: ClassVar[str | None] = "learns from solved trajectories only"

    min_reward: float = 1.0

    def kept_tokens(
        self,
        rewards: Float[Tensor, " responses"],
        faulty: Bool[Tensor, "responses length"],
        num_generations: int,
    ) -> Bool[Tensor, "responses length"]:
        """Return a mask of the tokens of solved trajectories, except those of turns whose calls failed."""
        return self.kept(rewards).to(faulty.device)[:, None] & ~faulty

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the loss of the solved trajectories (see `compute_loss`)."""
        return self.compute_loss(scores.logps, batch.mask), {}

    def metrics(self, batch: Experience) -> dict[str, Float[Tensor, ""]]:
        """Return `kept`, the share of trajectories to learn from."""
        return {"kept": batch.mask.any(1).float().mean()}

    def kept(self, rewards: Float[Tensor, " responses"]) -> Bool[Tensor, " responses"]:
        """Return a mask of the responses to learn from."""
        return rewards >= self.min_reward

    def compute_loss(
        self, logps: Float[Tensor, "responses length"], mask: Bool[Tensor, "responses length"]
    ) -> Float[Tensor, ""]:
        """Return the mean negative log-probability of the tokens in `mask`, or 0 if the mask is empty."""
        return -(logps * mask).sum() / mask.sum().clamp(min=1)
