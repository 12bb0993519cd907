"""Attention as an action: reward decides which units read beyond their window.

π_φ(a) = Π_u Bernoulli(a_u; σ(φ_u))
A_i    = (R_i − mean R) − λ (c_i − mean c)        over a group; c_i is the share of open units
L      = − mean_i min(r_i A_i, clip(r_i) A_i)     r_i = π_φ(a_i) / π_old(a_i)
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hybridmem.checks import at_least, one_of
from hybridmem.convert.allocation import Allocation as AllocationFile
from hybridmem.distributed import all_gather_object
from hybridmem.rl.attention.action import Action
from hybridmem.rl.attention.allocations import (
    MAX_LOGIT,
    Allocation,
    AllocationPolicy,
    SoftAllocation,
    by_group,
    shared,
)
from hybridmem.rl.attention.sources import SOURCES, Units, find_units
from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy

from .advantages import group_advantages
from .objective import LossAndMetrics, ModelLoader, Normaliser, Objective, ObjectiveError
from .ratios import clamp_log_ratio

UNITS = ("head", "layer")
PREFILLS = ("full", "allocated")
ESTIMATORS = ("sampled", "mixed")
COLLAPSED = 30  # rollouts far below the floor at no price
PATIENCE = 10  # rollouts in which full attention has to earn something


@dataclass(frozen=True, kw_only=True)
class Gates(Objective):
    """Settings shared by all objectives that hold an allocation.

    Args:
        source: the source of a closed unit beyond its window, `none` or `memory`; None: `memory` if every layer has
            one, otherwise `none`.
        unit: `head` (a KV head; a head of mag's gate) or `layer`.
        attention_window, num_sink_tokens: a converted model's window and first tokens; None keeps the model's.
        budget: share of units that stay open when the allocation is fixed; None keeps those with a probability of
            at least a half.

    Raises:
        ValueError: a setting that cannot work.
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
        at_least(1, attention_window=self.attention_window)
        at_least(0, num_sink_tokens=self.num_sink_tokens)
        if self.budget is not None and not 0 < self.budget < 1:
            raise ValueError(f"budget={self.budget} must lie between 0 and 1: the share of units that stay open")

    @property
    def trains_model(self) -> bool:
        """Return False: φ alone is trained; a gradient may pass through a model that is frozen."""
        return False

    @property
    def trains_head(self) -> bool:
        """Return False: the LM head gets no gradient."""
        return False

    def settle(self, policy: Policy) -> Allocation:
        """Return the allocation that would be fixed now."""
        return self.fixed(policy)

    def add_gates(self, policy: Policy, initial: float) -> None:
        """Put the policy of allocations into `policy.learned`.

        Args:
            policy: the policy.
            initial: probability of an open unit at the start.

        Raises:
            ValueError: a model without such units or source, or too few of them for the budget.
        """
        units = self.find_units(policy.model)
        gates = AllocationPolicy(len(units.layers), units.num_heads, self.unit == "layer", initial)
        if self.budget is not None and round(self.budget * gates.logits.numel()) == 0:
            count = gates.logits.numel()
            raise ValueError(f"budget={self.budget} opens none of {count} units: give at least {1 / count:.3g}")
        policy.learned[self.family] = gates

    def find_units(self, model: Any) -> Units:
        """Return the model's units."""
        return find_units(model, self.source, self.attention_window, self.num_sink_tokens)

    def gates(self, policy: Policy) -> AllocationPolicy:
        """Return the policy of allocations."""
        gates = policy.learned[self.family]
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
        """Return the current allocation of KV heads for `hybridmem export`; none for gates, which no file describes."""
        fixed, config = self.fixed(policy), policy.base_model.config
        sources = fixed.units.sources_of(fixed.policy.spread(fixed.opened.float())[0] > 0.5)
        if sources is None:
            return {}
        window, sinks = fixed.units.window_and_sinks
        trained = {"objective": type(self).__name__, "rollouts": int(fixed.policy.num_rollouts)}
        return {"allocation": AllocationFile(Path(config.name_or_path).name, window, sinks, sources, trained).to_dict()}


@dataclass(frozen=True, kw_only=True)
class LearnedGates(Gates):
    """Settings shared by all objectives that learn an allocation.

    Args:
        initial: probability of an open unit at the start.
        lr: learning rate of φ.
        init_from: checkpoint whose φ and price to start from, such as one with another `prefill` or `source`; or an
            allocation's JSON file, whose open heads start at `initial` and the others at 1 − `initial`.

    Raises:
        ValueError: a setting that cannot work.
    """

    initial: float = 0.8
    lr: float = 0.2
    init_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 1 / (1 + math.exp(MAX_LOGIT))
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
        return [{"params": [self.gates(policy).logits], "lr": self.lr, "weight_decay": 0.0}]


@dataclass(frozen=True, kw_only=True)
class AllocationRL(LearnedGates):
    """Learns from reward which units read beyond their window, under a price for each that does.

    A price λ makes open units costly. With a `budget` it rises while more units are open than that, and falls when
    fewer are. Without, it rises while the mean reward exceeds `min_reward` times the reward of full attention on the
    same prompts, and falls below it. The first response of each group then reads everything and is that reference.

    Alone, the objective leaves the model frozen and needs no pass over the responses. Beside a token objective or
    AttentionRL the model learns too, under the same allocations.

    Args:
        min_reward: floor of the mean reward relative to full attention, where no budget is set.
        prefill: `full` reads each prompt once with every unit open, and only responses by their allocation, a cheap
            surrogate; `allocated` reads everything by the allocation, as the fixed model will. Held-out prompts are
            always read by the allocation.
        estimator: `sampled` draws allocations and learns by their likelihood; `mixed` (RLKV, arXiv 2510.08525) mixes
            both outputs by σ(φ), and a token objective's gradient reaches φ.
        dual_lr: step of the price.
        epsilon: r is clipped to 1 ± epsilon.
        l1_price: of the sum of σ(φ), for `mixed`.
        min_priced_reward: mean reward from which `mixed` pays its price (RLKV's τ).
    """

    prefix: ClassVar[str] = "allocation/"
    learns_by_reward: ClassVar[bool] = True
    choice: ClassVar[str] = "allocation"
    chooses_in_environments: ClassVar[bool] = True

    min_reward: float = 0.9
    prefill: str = "full"
    estimator: str = "sampled"
    dual_lr: float = 1.0
    epsilon: float = 0.2
    l1_price: float = 1e-3
    min_priced_reward: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(PREFILLS, prefill=self.prefill)
        one_of(ESTIMATORS, estimator=self.estimator)
        if not self.min_reward > 0:
            raise ValueError(f"min_reward={self.min_reward} must be above 0, the share of full attention's reward")
        for name in ("dual_lr", "epsilon", "l1_price"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number")

    @property
    def explores(self) -> bool:
        """Return True: responses are sampled under allocations."""
        return True

    @property
    def splits_reading(self) -> bool:
        """Return True if `sampled` prefills prompts with all units open."""
        return self.estimator == "sampled" and self.prefill == "full"

    @property
    def reads_scores(self) -> bool:
        """Return False: the likelihood of an allocation needs no pass of the model."""
        return False

    @property
    def normaliser(self) -> Normaliser:
        """Return `responses`, because the loss is a mean over one allocation per response."""
        return "responses"

    def check_run(self, steps_per_rollout: int, num_generations: int) -> None:
        """Raise a ValueError if a group holds fewer than two allocations beside its reference."""
        if self.estimator == "sampled" and self.budget is None and num_generations < 3:
            raise ValueError(
                f"num_generations={num_generations}: one response of each group is full attention's, and one alone has "
                "no advantage; sample 3 or more, or set a budget"
            )

    def check_others(self, others: list[Objective]) -> None:
        """Raise a ValueError if `mixed` has no token objective whose gradient could reach φ."""
        if self.estimator == "mixed" and not any(other.trains_head for other in others):
            raise ValueError("estimator=mixed learns through a token objective: add GRPO or another to objectives")

    def act(self, policy: Policy, num_generations: int, time: int, generators: list[torch.Generator]) -> Action:
        """Draw an allocation for every response, except references, which read everything."""
        gates, units = self.gates(policy), self.find_units(policy.base_model)
        gates.clamp()  # before the draw, or the loss would clamp φ and find ratios other than 1
        if self.estimator == "mixed":
            return SoftAllocation(gates, units)
        opened = by_group(gates, num_generations, generators)
        if self.budget is None:
            opened[::num_generations] = True
        with torch.no_grad():
            return Allocation(gates, units, opened, self.prefill, gates.log_likelihood(opened))

    @torch.no_grad()
    def review(self, policy: Policy, experience: Experience, temperature: float) -> None:
        """Price a rollout's allocations and move the price.

        Raises:
            ObjectiveError: full attention earns nothing, so that min_reward sets no floor.
        """
        gates, rewards = self.gates(policy), experience.rewards.double()
        gates.num_rollouts += 1
        if self.estimator == "mixed":
            gates.price.fill_(self.l1_price if _global_mean(rewards) >= self.min_priced_reward else 0.0)
            return
        allocation: Any = experience.actions[self.family]
        size = experience.times
        assert isinstance(size, int)
        drawn, cost = torch.ones_like(rewards, dtype=torch.bool), allocation.costs.double()
        if self.budget is None:
            drawn[::size] = False
        gained, paid = (
            group_advantages(values[drawn], size - int(self.budget is None), "none") for values in (rewards, cost)
        )
        advantages = torch.zeros_like(rewards).masked_scatter(drawn, gained - gates.price * paid)
        experience.actions[self.family] = replace(allocation, advantages=advantages.float())
        if self.budget is not None:
            slack = _global_mean(cost) - self.budget
        else:
            full_reward = _global_mean(rewards[~drawn])
            self._watch_reference(gates, full_reward)
            slack = _global_mean(rewards[drawn]) - self.min_reward * full_reward
            self._watch_collapse(gates, _global_mean(rewards[drawn]), full_reward)
        gates.price.add_(self.dual_lr * slack).clamp_(min=0)

    def _watch_reference(self, gates: AllocationPolicy, full_reward: float) -> None:
        """Sum up the reward of full attention; without any there is no floor."""
        gates.full_reward += full_reward
        if gates.num_rollouts == PATIENCE and gates.full_reward <= 0:
            raise ObjectiveError(
                f"min_reward={self.min_reward} is relative to full attention, which earned nothing in {PATIENCE} "
                "rollouts: choose easier prompts or another model, or set a budget"
            )

    def _watch_collapse(self, gates: AllocationPolicy, reward: float, full_reward: float) -> None:
        """Stop a run that stays below half its floor although open units cost nothing."""
        below = bool(gates.price == 0) and reward < self.min_reward * full_reward / 2
        gates.num_collapsed.fill_(int(gates.num_collapsed) + 1 if below else 0)
        if gates.num_collapsed == COLLAPSED:
            raise ObjectiveError(
                f"the allocation collapsed: for {COLLAPSED} rollouts its reward was below half of min_reward="
                f"{self.min_reward} at a price of 0; resume from an earlier checkpoint with a smaller lr or dual_lr"
            )

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the clipped loss of the allocations, or the price of a mix."""
        gates = self.gates(policy)
        gates.clamp()
        metrics = {
            "closed": 1 - gates.probabilities.detach().mean(),
            "price": gates.price.float(),
            "decided": ((gates.probabilities.detach() - 0.5).abs() > 0.4).float().mean(),
        }
        if self.estimator == "mixed":
            return gates.price.float() * gates.probabilities.sum(), metrics
        allocation: Any = batch.actions[self.family]
        loss = self.compute_loss(gates.log_likelihood(allocation.opened), allocation.old_logps, allocation.advantages)
        return loss, metrics | {"cost": allocation.costs.mean()}

    def compute_loss(
        self,
        logps: Float[Tensor, " responses"],
        old_logps: Float[Tensor, " responses"],
        advantages: Float[Tensor, " responses"],
    ) -> Float[Tensor, ""]:
        """Return − mean min(r A, clip(r) A) over allocations."""
        ratio = clamp_log_ratio(logps - old_logps).exp()
        clipped = ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def _global_mean(values: Float[Tensor, " responses"]) -> float:
    """Return the mean over the responses of all ranks."""
    parts = all_gather_object((float(values.double().sum()), len(values)))
    return sum(total for total, _ in parts) / sum(count for _, count in parts)
