"""Allocations in an order that does not depend on data, as controls for learned ones."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from hybridmem.checks import at_least, one_of
from hybridmem.rl.attention.action import Action
from hybridmem.rl.attention.allocations import MAX_LOGIT, UnitPolicy
from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy

from .gates import Gates
from .objective import LossAndMetrics, ModelLoader

ORDERS = ("random", "last_layers")


@dataclass(frozen=True, kw_only=True)
class FixedAllocation(Gates):
    """Allocation that opens units in a fixed order and learns nothing; `hybridmem validate` measures it.

    Together with a token objective, the model learns under this allocation.

    Args:
        order: `random`, or `last_layers` first.
        seed: seed of the random order. None: seed_everything.

    Raises:
        ValueError: the budget is missing, or a setting is invalid.
    """

    learns: ClassVar[bool] = False
    choice: ClassVar[str] = "allocation"
    chooses_in_environments: ClassVar[bool] = True

    order: str = "random"
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(ORDERS, order=self.order)
        at_least(0, seed=self.seed)
        if self.budget is None:
            raise ValueError("budget=None leaves a fixed order without an end: give the share of units that stay open")

    @property
    def explores(self) -> bool:
        """Return True: responses are sampled under the allocation."""
        return True

    @property
    def reads_scores(self) -> bool:
        """Return False: the loss is zero."""
        return False

    def provenance(self, gates: UnitPolicy) -> dict[str, Any]:
        """Return the order."""
        return {"order": self.order}

    def prepare(self, policy: Policy, load: ModelLoader) -> None:
        """Add gates whose logits fall from the first unit of the order to the last."""
        self.add_gates(policy, initial=0.5)
        logits = self.gates(policy).logits.requires_grad_(False)
        falling = torch.linspace(MAX_LOGIT, -MAX_LOGIT, logits.numel())
        logits.flatten()[self.units_in_order(logits.numel())] = falling

    def units_in_order(self, count: int) -> Int[Tensor, " units"]:
        """Return the units in the order in which a budget opens them."""
        if self.order == "last_layers":
            return torch.arange(count).flip(0)
        seed = torch.initial_seed() if self.seed is None else self.seed
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def act(self, policy: Policy, num_generations: int, time: int, generators: list[torch.Generator]) -> Action:
        """Return the allocation, which all responses share."""
        return self.fixed(policy)

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return a loss of zero."""
        return scores.logps.new_zeros(()), {}
