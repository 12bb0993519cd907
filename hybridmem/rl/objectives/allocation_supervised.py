"""Supervised ways to learn an allocation, as controls of AllocationRL: answers, or full attention as a teacher.

Both mix full attention and a closed unit's reading by σ(φ), with a price on the sum of σ(φ).
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hybridmem.rl.attention.action import Action
from hybridmem.rl.attention.allocations import SoftAllocation, UnitPolicy
from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy
from hybridmem.rl.rollouts.scoring import last_hidden_states

from .gates import LearnedGates
from .objective import LossAndMetrics


@dataclass(frozen=True, kw_only=True)
class SoftGates(LearnedGates):
    """Gates that learn from given answers through a mix, while the model stays frozen.

    Args:
        l1_price: price of the sum of σ(φ).
    """

    samples: ClassVar[bool] = False
    prefix: ClassVar[str] = "allocation/"
    alone: ClassVar[str | None] = "learns from given answers and leaves the model frozen"

    l1_price: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.l1_price < math.inf:
            raise ValueError(f"l1_price={self.l1_price} must be 0 or a positive number")

    def act(self, policy: Policy, num_generations: int, time: int, generators: list[torch.Generator]) -> Action:
        """Return the mix under which answers are read."""
        return SoftAllocation(self.gates(policy), self.find_units(policy.base_model))

    def provenance(self, gates: UnitPolicy) -> dict[str, Any]:
        """Return the number of optimiser steps."""
        return {"steps": int(gates.num_rollouts)}

    def priced(self, policy: Policy, loss: Float[Tensor, ""]) -> LossAndMetrics:
        """Return a loss with the price of open units, and its metrics."""
        gates = self.gates(policy)
        gates.clamp()
        gates.num_rollouts += 1
        probabilities = gates.probabilities
        return loss + self.l1_price * probabilities.sum(), {"closed": 1 - probabilities.detach().mean()}


@dataclass(frozen=True, kw_only=True)
class AllocationSFT(SoftGates):
    """Cross-entropy of the answers' tokens through a mix."""

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the mean negative log-probability of the answers' tokens, with the price."""
        return self.priced(policy, -(scores.logps * batch.mask).sum() / batch.mask.sum())


@dataclass(frozen=True, kw_only=True)
class AllocationDistillation(SoftGates):
    """Distance from full attention's last hidden states at the answers' tokens (DuoAttention, arXiv 2410.10819)."""

    l1_price: float = 0.05

    @property
    def reads_scores(self) -> bool:
        """Return False: the loss reads hidden states."""
        return False

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the mean squared distance of the hidden states over the answers' tokens, with the price."""
        action: Any = batch.actions[self.family]
        with action.applied(policy.model):
            mixed = last_hidden_states(policy.base_model, batch.prompts, batch.completions)
        with torch.no_grad(), action.units.applied(policy.model, None):
            full = last_hidden_states(policy.base_model, batch.prompts, batch.completions)
        distance = (mixed - full).float().square().mean(-1)
        return self.priced(policy, (distance * batch.mask).sum() / batch.mask.sum())
