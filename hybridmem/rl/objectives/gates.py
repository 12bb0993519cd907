"""Settings and hooks of all objectives that hold an allocation or a router."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hybridmem.checks import at_least, one_of
from hybridmem.convert.allocation import Allocation as AllocationFile
from hybridmem.rl.attention.action import Action
from hybridmem.rl.attention.allocations import (
    Allocation,
    AllocationPolicy,
    UnitPolicy,
    least_probability,
    shared,
    spread,
)
from hybridmem.rl.attention.routing import RouterPolicy, SettledRouting
from hybridmem.rl.attention.sources import SOURCES, Units, find_units
from hybridmem.rl.rollouts.policy import Policy

from .objective import ModelLoader, Objective

UNITS = ("head", "layer", "token")


@dataclass(frozen=True, kw_only=True)
class Gates(Objective):
    """Settings shared by all objectives that hold an allocation.

    Args:
        source: the source of a closed unit beyond its window, `none` or `memory`; None: `memory` if every layer has
            one, otherwise `none`.
        unit: `head` (a KV head; a head of mag's gate), `layer`, or `token` (in each layer, for AllocationRL).
        attention_window, num_sink_tokens: a converted model's window and first tokens; None keeps the model's.
        budget: share of units that stay open when the allocation is fixed; None keeps those with a probability of
            at least a half. Tokens are always judged by their probability.

    Raises:
        ValueError: a setting is invalid.
    """

    family: ClassVar[str] = "Allocation"

    source: str | None = "none"
    unit: str = "head"
    attention_window: int | None = None
    num_sink_tokens: int | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.source is not None:
            one_of(SOURCES, source=self.source)
        one_of(UNITS, unit=self.unit)
        if self.unit == "token" and not self.routes_tokens:
            raise ValueError(
                "unit=token needs AllocationRL with estimator=sampled: use it, or set unit to head or layer"
            )
        at_least(1, attention_window=self.attention_window)
        at_least(0, num_sink_tokens=self.num_sink_tokens)
        if self.budget is not None and not 0 < self.budget < 1:
            raise ValueError(f"budget={self.budget} must lie between 0 and 1: the share of units that stay open")

    @property
    def routes_tokens(self) -> bool:
        """Return True if the objective can learn a router."""
        return False

    @property
    def trains_model(self) -> bool:
        """Return False: φ alone is trained; a gradient may pass through a model that is frozen."""
        return False

    @property
    def trains_head(self) -> bool:
        """Return False: the LM head gets no gradient."""
        return False

    def settle(self, policy: Policy) -> Action:
        """Return the allocation that would be fixed now, or the router's rule."""
        gates = self.unit_policy(policy)
        if isinstance(gates, RouterPolicy):
            return SettledRouting(gates, self.find_units(policy.base_model))
        return self.fixed(policy)

    def add_gates(self, policy: Policy, initial: float) -> None:
        """Put the policy of allocations into `policy.learned`.

        Args:
            policy: the policy.
            initial: probability of an open unit at the start.

        Raises:
            ValueError: the model lacks the units or their source, or has too few units for the budget.
        """
        units = self.find_units(policy.model)
        if self.unit == "token":
            width = policy.model.config.get_text_config().hidden_size
            policy.learned[self.family] = RouterPolicy(len(units.layers), units.num_heads, width, initial)
            return
        gates = AllocationPolicy(len(units.layers), units.num_heads, self.unit == "layer", initial)
        if self.budget is not None and round(self.budget * gates.logits.numel()) == 0:
            count = gates.logits.numel()
            raise ValueError(f"budget={self.budget} opens none of {count} units: give at least {1 / count:.3g}")
        policy.learned[self.family] = gates

    def find_units(self, model: Any) -> Units:
        """Return the model's units."""
        return find_units(model, self.source, self.attention_window, self.num_sink_tokens)

    def unit_policy(self, policy: Policy) -> AllocationPolicy | RouterPolicy:
        """Return the policy of allocations, or the router."""
        gates = policy.learned[self.family]
        assert isinstance(gates, AllocationPolicy | RouterPolicy)
        return gates

    def gates(self, policy: Policy) -> AllocationPolicy:
        """Return the policy of allocations."""
        gates = self.unit_policy(policy)
        assert isinstance(gates, AllocationPolicy)
        return gates

    def fixed(self, policy: Policy) -> Allocation:
        """Return the allocation of the current φ: the likeliest units within the budget."""
        if self.budget is not None:
            return self.likeliest(policy, self.budget)
        probabilities = self.gates(policy).probabilities
        return self.likeliest(policy, float((probabilities >= 0.5).sum()) / probabilities.numel())

    def likeliest(self, policy: Policy, share: float) -> Allocation:
        """Return the allocation that opens a share of the units, the likeliest ones."""
        gates = self.gates(policy)
        opened = gates.ranked(round(share * gates.logits.numel()))
        return shared(opened, gates, self.find_units(policy.base_model))

    def artefacts(self, policy: Policy) -> dict[str, Any]:
        """Return the current allocation of KV heads for `hybridmem export`, or nothing for gates and routers.

        The file format does not cover gates of `mag`, or decisions that depend on tokens.
        """
        if isinstance(self.unit_policy(policy), RouterPolicy):
            return {}
        fixed, config = self.fixed(policy), policy.base_model.config
        sources = fixed.units.sources_of(spread(fixed.opened.float(), fixed.units)[0] > 0.5)
        if sources is None:
            return {}
        window, sinks = fixed.units.window_and_sinks
        trained = {"objective": type(self).__name__, **self.provenance(self.gates(policy))}
        return {"allocation": AllocationFile(Path(config.name_or_path).name, window, sinks, sources, trained).to_dict()}

    def provenance(self, gates: UnitPolicy) -> dict[str, Any]:
        """Return the origin of an exported allocation, in addition to the objective's name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class LearnedGates(Gates):
    """Settings shared by all objectives that learn an allocation.

    Args:
        initial: probability of an open unit at the start.
        lr: learning rate of φ.
        init_from: checkpoint whose φ and price to start from, such as one with another `prefill` or `source`; or an
            allocation's JSON file, whose open heads start at `initial` and the others at 1 − `initial`.

    Raises:
        ValueError: a setting is invalid.
    """

    initial: float = 0.8
    lr: float = 0.2
    init_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least = least_probability()
        if not least <= self.initial <= 1 - least:
            raise ValueError(f"initial={self.initial} must lie between {least:.3f} and {1 - least:.3f}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be a positive number")

    def prepare(self, policy: Policy, load: ModelLoader) -> None:
        """Add φ.

        Raises:
            ValueError: the model lacks the units or their source.
        """
        self.add_gates(policy, self.initial)

    def parameter_groups(self, policy: Policy) -> list[dict[str, Any]]:
        """Return φ with its learning rate."""
        return [{"params": list(self.unit_policy(policy).parameters()), "lr": self.lr, "weight_decay": 0.0}]
