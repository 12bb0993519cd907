"""Attention as an action: reward decides which units read beyond their window.

π_φ(a) = Π_u Bernoulli(a_u; σ(φ_u))
A_i    = (R_i − mean R) − λ (c_i − mean c)        over a group; c_i is the share of open units
L      = − mean_i min(r_i A_i, clip(r_i) A_i)     r_i = π_φ(a_i) / π_old(a_i)
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hybridmem.checks import one_of
from hybridmem.distributed import all_gather_object
from hybridmem.rl.attention.action import Action
from hybridmem.rl.attention.allocations import (
    Allocation,
    AllocationPolicy,
    SoftAllocation,
    UnitPolicy,
    least_probability,
)
from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy

from .advantages import group_advantages
from .gates import LearnedGates
from .objective import LossAndMetrics, Normaliser, Objective, ObjectiveError
from .ratios import clamp_log_ratio

PREFILLS = ("full", "allocated")
ESTIMATORS = ("sampled", "mixed")
COLLAPSED = 30  # rollouts far below the floor at no price
PATIENCE = 10  # rollouts in which full attention has to earn something


@dataclass(frozen=True, kw_only=True)
class AllocationRL(LearnedGates):
    """Learns from reward which heads, layers or tokens read beyond their window, under a price for each that does.

    With `unit: write` it learns which tokens a memory stores; an open token is then a stored one.

    A price λ makes open units costly. With a `budget` it rises while more units are open than that, and falls when
    fewer are. Without, it rises while the mean reward exceeds `min_reward` times the reward of full attention on the
    same prompts, and falls below it. The first response of each group then reads everything and is that reference.

    Alone, the objective leaves the model frozen and needs no pass over the responses. Beside a token objective or
    AttentionRL the model learns too, under the same allocations.

    Args:
        min_reward: floor of the mean reward relative to full attention, where no budget is set. A negative reward may
            grow in magnitude by the rest: 0.9 of -10 is -11.
        prefill: `full` reads each prompt once with every unit open, and only responses by their allocation, a cheap
            surrogate; `allocated` reads everything by the allocation, as the fixed model will. Held-out prompts are
            always read by the allocation. Writes need `allocated`.
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
        if self.unit == "write" and self.prefill == "full":
            raise ValueError(
                "prefill=full stores every token of a prompt, so that unit=write has nothing to choose there: set "
                "prefill to allocated"
            )
        least = least_probability()
        if self.budget is not None and self.budget <= least and self.estimator == "sampled":
            raise ValueError(
                f"budget={self.budget} cannot be met, because every unit stays open with a probability of at least "
                f"{least:.3f}, to keep exploring: give more, or fix the trained allocation with a smaller budget"
            )
        if not self.min_reward > 0:
            raise ValueError(f"min_reward={self.min_reward} must be above 0, the share of full attention's reward")
        for name in ("dual_lr", "epsilon", "l1_price"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a positive number")

    @property
    def routes_tokens(self) -> bool:
        """Return True: tokens are units if decisions are sampled."""
        return self.estimator == "sampled"

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

    def provenance(self, gates: UnitPolicy) -> dict[str, Any]:
        """Return the number of rollouts."""
        return {"rollouts": int(gates.num_rollouts)}

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
        gates, units = self.unit_policy(policy), self.find_units(policy.base_model)
        if isinstance(gates, AllocationPolicy) and self.estimator == "mixed":
            return SoftAllocation(gates, units)
        return gates.sample(units, num_generations, generators, self.prefill, self.budget is None)

    def contrast(self, policy: Policy, num_prompts: int, num_generations: int) -> Action:
        """Open every unit for every second response to a prompt, and none for the others."""
        gates, units = self.unit_policy(policy), self.find_units(policy.base_model)
        opened = (torch.arange(num_prompts * num_generations, device=policy.device) % num_generations) % 2 == 0
        rows = opened[:, None, None].expand(-1, *gates.shape)
        return Allocation(gates, units, rows, self.prefill, torch.zeros(len(rows), device=policy.device))

    @torch.no_grad()
    def review(self, policy: Policy, experience: Experience, temperature: float) -> None:
        """Price a rollout's allocations and move the price.

        Raises:
            ObjectiveError: full attention earns nothing, so that min_reward sets no floor.
        """
        gates, rewards = self.unit_policy(policy), experience.rewards.double()
        gates.num_rollouts += 1
        if self.estimator == "mixed":
            gates.price.fill_(self.l1_price if _global_mean(rewards) >= self.min_priced_reward else 0.0)
            return
        chosen: Any = experience.actions[self.family]
        prompts = experience.prompts.attention_mask
        prompts = torch.ones_like(experience.prompts.input_ids, dtype=torch.bool) if prompts is None else prompts
        allocation = chosen.counted(prompts, experience.completions.mask)
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
            full_reward, reward = _global_mean(rewards[~drawn]), _global_mean(rewards[drawn])
            self._watch_reference(gates, _global_mean(rewards[~drawn].abs()))
            slack = reward - reward_floor(full_reward, self.min_reward)
            self._watch_collapse(gates, reward, full_reward)
        gates.price.add_(self.dual_lr * slack).clamp_(min=0)

    def _watch_reference(self, gates: UnitPolicy, magnitude: float) -> None:
        """Sum up the magnitude of full attention's rewards; without any there is no floor."""
        gates.full_reward += magnitude
        if gates.num_rollouts == PATIENCE and gates.full_reward == 0:
            raise ObjectiveError(
                f"min_reward={self.min_reward} is relative to full attention, which earned nothing in {PATIENCE} "
                "rollouts: choose easier prompts or another model, or set a budget"
            )

    def _watch_collapse(self, gates: UnitPolicy, reward: float, full_reward: float) -> None:
        """Stop a run that stays below half its floor although open units cost nothing."""
        below = bool(gates.price == 0) and reward < reward_floor(full_reward, self.min_reward / 2)
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
        gates = self.unit_policy(policy)
        price = gates.price.float()
        if isinstance(gates, AllocationPolicy) and self.estimator == "mixed":
            gates.clamp()
            return price * gates.probabilities.sum(), _metrics(price, gates.probabilities.detach())
        allocation: Any = batch.actions[self.family]
        logps, probabilities = gates.likelihoods(allocation)
        loss = self.compute_loss(logps, allocation.old_logps, allocation.advantages)
        costs = {"cost": allocation.costs.mean()} if probabilities.numel() else {}
        return loss, _metrics(price, probabilities) | costs

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


def _metrics(price: Tensor, probabilities: Tensor) -> dict[str, Tensor]:
    """Return the price, and the probabilities' means unless no decision was drawn."""
    if not probabilities.numel():
        return {"price": price}
    decided = (probabilities - 0.5).abs() > 0.4
    return {"closed": 1 - probabilities.mean(), "price": price, "decided": decided.float().mean()}


def reward_floor(full_reward: float, share: float) -> float:
    """Return the reward that keeps a share of full attention's, or exceeds a negative one's magnitude by the rest."""
    return share * full_reward if full_reward >= 0 else (2 - share) * full_reward


def _global_mean(values: Float[Tensor, " responses"]) -> float:
    """Return the mean over the responses of all ranks."""
    parts = all_gather_object((float(values.double().sum()), len(values)))
    return sum(total for total, _ in parts) / sum(count for _, count in parts)
