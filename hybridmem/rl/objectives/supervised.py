"""Objectives on given or solved answers: supervised and rejection fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy

from .objective import LossAndMetrics, Objective


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """Supervised fine-tuning, what rewards compare with: the answer's tokens, whatever would have been sampled."""

    family: ClassVar[str] = "SFT"
    samples: ClassVar[bool] = False
    alone: ClassVar[str | None] = "learns from answers and samples none"

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return `compute_loss` of the answers."""
        return self.compute_loss(scores.logps, batch.mask), {}

    def compute_loss(
        self, logps: Float[Tensor, "responses length"], mask: Bool[Tensor, "responses length"]
    ) -> Float[Tensor, ""]:
        """Mean negative log-probability of the answers' tokens, their ends among them."""
        return -(logps * mask).sum() / mask.sum()


@dataclass(frozen=True, kw_only=True)
class RejectionFineTune(Objective):
    """Fine-tuning on the policy's own solved trajectories, but for turns whose calls failed (arXiv 2508.03501).

    Args:
        min_reward: what a trajectory must earn to be learnt from.
    """

    family: ClassVar[str] = "RejectionFineTune"
    prefix: ClassVar[str] = "rejection/"
    alone: ClassVar[str | None] = "learns from what was solved alone"

    min_reward: float = 1.0

    def kept_tokens(
        self,
        rewards: Float[Tensor, " responses"],
        faulty: Bool[Tensor, "responses length"],
        num_generations: int,
    ) -> Bool[Tensor, "responses length"]:
        """Return the tokens of solved trajectories, except turns whose calls failed."""
        return self.kept(rewards).to(faulty.device)[:, None] & ~faulty

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return `compute_loss` of the solved trajectories."""
        return self.compute_loss(scores.logps, batch.mask), {}

    def metrics(self, batch: Experience) -> dict[str, Float[Tensor, ""]]:
        """Return the share of trajectories that are learnt from."""
        return {"kept": batch.mask.any(1).float().mean()}

    def kept(self, rewards: Float[Tensor, " responses"]) -> Bool[Tensor, " responses"]:
        """Which responses are learnt from."""
        return rewards >= self.min_reward

    def compute_loss(
        self, logps: Float[Tensor, "responses length"], mask: Bool[Tensor, "responses length"]
    ) -> Float[Tensor, ""]:
        """Mean negative log-probability of the tokens of `mask`; 0 where nothing was solved."""
        return -(logps * mask).sum() / mask.sum().clamp(min=1)
