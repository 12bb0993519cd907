"""Token objectives: one class per algorithm, with the published settings as defaults.

The policy answers each prompt `num_generations` times; these responses form a group and are adjacent in the batch. The
advantage A of a response is its reward relative to the group's mean. With r = π_θ / π_old, the ratio of a token's
probability under the policy to that under the sampling policy, the loss of a token is

    −min(r A, clip(r, 1 − ε, 1 + ε_high) A)        GRPO and its descendants
    −sg(min(r, ε_high)) A log π_θ                  CISPO, where sg stops the gradient

plus β KL(π_θ ‖ π_ref), estimated by k3. Settings have TRL's names and semantics, and equal settings give TRL's loss.
"""

import copy
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hybridmem.distributed import gather_groups, own_groups
from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy
from hybridmem.rl.rollouts.scoring import completion_logps

from .advantages import SCALES, check_choice, group_advantages, grouped
from .objective import LossAndMetrics, ModelLoader, Normaliser, Objective
from .ratios import clamp_log_ratio

IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
NORMALISERS: dict[str, Normaliser] = {
    "grpo": "responses",
    "dr_grpo": "responses",
    "bnpo": "tokens",
    "dapo": "processes",
}


@dataclass(frozen=True, kw_only=True)
class TokenObjective(Objective):
    """Loss on generated tokens; the algorithms below define the loss of a single token.

    Args:
        importance_sampling_level: `token` for one ratio per token, or `sequence` for one ratio per response, the
            geometric mean over its tokens.
        loss_type: the denominator of the summed token losses. `grpo`: each response's length, then the mean over
            responses; `bnpo`: the tokens of the call; `dapo`: the tokens of the whole generation batch; `dr_grpo`:
            responses × max_completion_length.
        scale_rewards: divide advantages by the standard deviation of the `group` or the `batch`, or by `none`.
        beta: weight of the KL divergence from a reference model; 0 needs no reference model.
        use_bias_correction_kl: multiply each token's KL by its ratio, which makes the KL's gradient unbiased. This is
            TRL's default; the papers do not do it.
        mask_truncated_completions: exclude responses that were cut off from the loss.
        dynamic_sampling: replace groups whose rewards are all equal by groups of other prompts.

    Raises:
        ValueError: A setting is out of range or unknown.
    """

    family: ClassVar[str] = "TokenObjective"
    learns_by_reward: ClassVar[bool] = True

    importance_sampling_level: str = "token"
    loss_type: str = "grpo"
    scale_rewards: str = "group"
    beta: float = 0.0
    use_bias_correction_kl: bool = False
    mask_truncated_completions: bool = False
    dynamic_sampling: bool = False

    def __post_init__(self) -> None:
        check_choice("importance_sampling_level", self.importance_sampling_level, IMPORTANCE_SAMPLING_LEVELS)
        check_choice("loss_type", self.loss_type, LOSS_TYPES)
        check_choice("scale_rewards", self.scale_rewards, SCALES)
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"beta={self.beta} must be 0 (no reference model) or a positive number")

    @abstractmethod
    def policy_loss(
        self,
        ratio: Float[Tensor, "responses #length"],
        logps: Float[Tensor, "responses length"],
        advantages: Float[Tensor, "responses 1"],
    ) -> tuple[Float[Tensor, "responses #length"], dict[str, Bool[Tensor, "responses #length"]]]:
        """Return the loss of each token, and a mask of clipped ratios for each clipping metric."""

    def compute_loss(
        self,
        logps: Float[Tensor, "responses length"],
        old_logps: Float[Tensor, "responses length"],
        advantages: Float[Tensor, " responses"],
        mask: Bool[Tensor, "responses length"],
        ref_logps: Float[Tensor, "responses length"] | None = None,
        num_items: int | float | Shaped[Tensor, ""] | None = None,
        max_completion_length: int | None = None,
        **inputs: Tensor,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the loss of some responses and its metrics; the caller averages over accumulation steps and ranks.

        Args:
            logps: log-probabilities of the generated tokens under the policy, in nats.
            old_logps: their log-probabilities under the sampling policy.
            advantages: one advantage per response.
            mask: the tokens that carry loss, EOS included. Values off the mask are ignored.
            ref_logps: log-probabilities under the reference model. At beta=0 they only serve the `kl` metric.
            num_items: for `dapo`: the number of tokens that carry loss in the generation batch, over all ranks, divided
                by the number of calls into which the batch is split.
            max_completion_length: for `dr_grpo`: the maximum number of tokens in a response.
            inputs: further arguments of the algorithm's `policy_loss`.

        Returns:
            The loss, and metrics under TRL's names: `clip_ratio/low_mean`, `clip_ratio/high_mean` and
            `clip_ratio/region_mean`, or `cispo_clip_ratio`, as shares of tokens (of responses for sequence-level
            ratios); and `kl`, the mean over tokens in nats.

        Raises:
            ValueError: The settings require ref_logps, num_items or max_completion_length, and it is missing.
        """
        if self.beta and ref_logps is None:
            raise ValueError(f"beta={self.beta} needs a reference model: pass ref_logps, or set beta=0")
        logps, old_logps = logps.masked_fill(~mask, 0), old_logps.masked_fill(~mask, 0)
        ratio = importance_ratio(logps, old_logps, mask, self.importance_sampling_level)
        token_loss, clipped = self.policy_loss(ratio, logps, advantages[:, None], **inputs)
        metrics = {name: _mean(where.to(logps), mask) for name, where in clipped.items()}
        if ref_logps is not None:
            kl = kl_estimate(logps, ref_logps.masked_fill(~mask, 0))
            kl = kl * ratio if self.use_bias_correction_kl else kl
            metrics["kl"] = _mean(kl.detach(), mask)
            token_loss = token_loss + self.beta * kl if self.beta else token_loss
        return aggregate(token_loss, mask, self.loss_type, num_items, max_completion_length), metrics

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the loss of a batch of responses and its metrics (see `compute_loss`)."""
        refined = {} if batch.refined is None else {"refined": batch.refined}
        return self.compute_loss(
            scores.logps,
            old.logps,
            batch.advantages,
            batch.mask,
            ref_logps=batch.ref_logps,
            num_items=batch.num_items,
            max_completion_length=batch.max_completion_length,
            **refined,
        )

    @property
    def normaliser(self) -> Normaliser:
        """Return the quantity over which loss_type averages the loss."""
        return NORMALISERS[self.loss_type]

    def prepare(self, policy: Policy, load: ModelLoader) -> None:
        """Copy the policy as reference model, unless disabling its adapters gives the reference model."""
        if self.beta and not policy.adapted:
            policy.frozen["reference"] = copy.deepcopy(policy.model).eval().requires_grad_(False)

    def advantages(
        self, rewards: Float[Tensor, " responses"], sizes: Int[Tensor, " groups"], num_generations: int
    ) -> Float[Tensor, " responses"] | None:
        """Return group-relative advantages; the standard deviation of a batch covers all ranks."""
        everyones = gather_groups(rewards, num_generations)
        return own_groups(group_advantages(everyones, num_generations, self.scale_rewards), num_generations)

    @torch.no_grad()
    def review(self, policy: Policy, experience: Experience, temperature: float) -> None:
        """Score the rollout under the reference model, with the actions under which the policy is scored."""
        if not self.beta:
            return
        actions = [action for action in experience.actions.values() if action.in_passes]
        times = policy.shared_times(experience.times)
        read = experience.prompts, experience.completions, temperature, times, actions
        if policy.adapted:
            with policy.model.disable_adapter():
                experience.ref_logps = completion_logps(policy.model, *read)[0]
        else:
            experience.ref_logps = completion_logps(policy.frozen_model("reference"), *read)[0]

    def loss_mask(
        self, mask: Bool[Tensor, "responses length"], truncated: Bool[Tensor, " responses"]
    ) -> Bool[Tensor, "responses length"]:
        """Return a mask of the tokens that carry loss; mask_truncated_completions drops responses that were cut off."""
        return mask & ~truncated[:, None] if self.mask_truncated_completions else mask


@dataclass(frozen=True, kw_only=True)
class GRPO(TokenObjective):
    """Group relative policy optimisation (arXiv 2402.03300), which clips the ratio to keep the policy close.

    Args:
        epsilon: the ratio's lower clipping range, above 0: below 1 − epsilon a token has no gradient.
        epsilon_high: the upper clipping range; None takes epsilon.
        delta: upper bound on the ratio for negative advantages, which clipping leaves unbounded (arXiv 2505.07291).
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.04

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("epsilon", self.epsilon), ("epsilon_high", self.upper)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0, or only ratios of exactly 1 have a gradient")
        if self.delta is not None and not self.delta > 1 + self.upper:
            raise ValueError(
                f"delta={self.delta} must be above 1 + epsilon_high = {1 + self.upper:g}, the upper clipping bound"
            )

    @property
    def upper(self) -> float:
        """Return the upper clipping range, epsilon_high; it defaults to epsilon."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def policy_loss(
        self,
        ratio: Float[Tensor, "responses #length"],
        logps: Float[Tensor, "responses length"],
        advantages: Float[Tensor, "responses 1"],
    ) -> tuple[Float[Tensor, "responses #length"], dict[str, Bool[Tensor, "responses #length"]]]:
        """Return −min(r A, clip(r, 1 − ε, 1 + ε_high) A), with r at most delta."""
        low, high = 1 - self.epsilon, 1 + self.upper
        bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
        loss = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)
        is_low, is_high = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
        return loss, {
            "clip_ratio/low_mean": is_low,
            "clip_ratio/high_mean": is_high,
            "clip_ratio/region_mean": is_low | is_high,
        }


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """Dr. GRPO (arXiv 2503.20783): no division by length, which favours long failures, or by standard deviation."""

    loss_type: str = "dr_grpo"
    scale_rewards: str = "none"
    beta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """DAPO (arXiv 2503.14476): clip-higher, equal weight for every token, and dynamic sampling.

    Its soft overlong punishment is a reward, `OverlongPenalty`, and needs mask_truncated_completions=False.
    """

    epsilon_high: float | None = 0.28
    loss_type: str = "dapo"
    beta: float = 0.0
    dynamic_sampling: bool = True


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """Group sequence policy optimisation (arXiv 2507.18071): one ratio per response, clipped as a whole."""

    epsilon: float = 3e-4
    epsilon_high: float | None = 4e-4
    importance_sampling_level: str = "sequence"
    beta: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CISPO(TokenObjective):
    """CISPO (MiniMax-M1, arXiv 2506.13585): the ratio is a clipped weight, and every token keeps its gradient.

    Args:
        epsilon_high: upper bound of the weight itself, as in TRL, not of its distance from 1. MiniMax-M1 does not
            publish its value; the default is ScaleRL's (arXiv 2510.13786).
    """

    epsilon_high: float = 5.0
    loss_type: str = "dapo"
    dynamic_sampling: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon_high > 1:
            raise ValueError(
                f"epsilon_high={self.epsilon_high} must be above 1: CISPO bounds the ratio itself, which starts at 1"
            )

    def policy_loss(
        self,
        ratio: Float[Tensor, "responses #length"],
        logps: Float[Tensor, "responses length"],
        advantages: Float[Tensor, "responses 1"],
    ) -> tuple[Float[Tensor, "responses #length"], dict[str, Bool[Tensor, "responses #length"]]]:
        """Return −sg(min(r, ε_high)) A log π_θ."""
        loss = -ratio.detach().clamp(max=self.epsilon_high) * advantages * logps
        return loss, {"cispo_clip_ratio": (ratio > self.epsilon_high) & (advantages > 0)}


@dataclass(frozen=True, kw_only=True)
class SWEDapo(DAPO):
    """DAPO for multi-turn agents (arXiv 2508.03501), with a length penalty and without dynamic sampling or masking.

    Groups that always or never succeed have no advantage, and their tokens do not count in the loss's denominator. The
    paper trains in two stages: epsilon_high 0.3 with PolicyModule's max_turns 40, then 0.26 with 80.

    Args:
        free_turns: L_thr, the number of turns without penalty. The penalty of longer trajectories reaches 1 at
            max_turns.
        min_solve_rate, max_solve_rate: groups whose mean reward is not strictly between these bounds are excluded.
    """

    epsilon_high: float | None = 0.3
    dynamic_sampling: bool = False
    free_turns: int = 10
    min_solve_rate: float = 0.0
    max_solve_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dynamic_sampling:
            raise ValueError("dynamic_sampling=True is not supported by SWEDapo; set it to False, or use DAPO")
        if self.free_turns < 0:
            raise ValueError(f"free_turns={self.free_turns} must be at least 0")
        if not self.min_solve_rate < self.max_solve_rate:
            raise ValueError(
                f"min_solve_rate={self.min_solve_rate} must be below max_solve_rate={self.max_solve_rate}, or every "
                "group is excluded"
            )

    def shape_rewards(
        self, rewards: Float[Tensor, " responses"], turns: Int[Tensor, " responses"], max_turns: int
    ) -> Float[Tensor, " responses"]:
        """Return R + min(0, (L_thr − turns) / (T_max − L_thr))."""
        if max_turns <= self.free_turns:
            return rewards
        return rewards + ((self.free_turns - turns) / (max_turns - self.free_turns)).clamp(max=0)

    def kept(self, rewards: Float[Tensor, " responses"], num_generations: int) -> Bool[Tensor, " responses"]:
        """Return a mask of the responses in groups whose mean unshaped reward is between the two rates."""
        rates = grouped(rewards, num_generations).mean(1)
        return ((rates > self.min_solve_rate) & (rates < self.max_solve_rate)).repeat_interleave(num_generations)

    def kept_tokens(
        self,
        rewards: Float[Tensor, " responses"],
        faulty: Bool[Tensor, "responses length"],
        num_generations: int,
    ) -> Bool[Tensor, "responses length"]:
        """Return a mask of all tokens in the groups that `kept` selects."""
        kept = self.kept(rewards, num_generations).to(faulty.device)
        return kept[:, None].expand_as(faulty)


def importance_ratio(
    logps: Float[Tensor, "responses length"],
    old_logps: Float[Tensor, "responses length"],
    mask: Bool[Tensor, "responses length"],
    level: str,
) -> Float[Tensor, "responses #length"]:
    """Return r = π_θ / π_old per token, or its geometric mean per response; both inputs must be 0 off the mask."""
    log_ratio = logps - old_logps
    if level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return clamp_log_ratio(log_ratio).exp()


def kl_estimate(
    logps: Float[Tensor, "responses length"], ref_logps: Float[Tensor, "responses length"]
) -> Float[Tensor, "responses length"]:
    """Return k3, π_ref/π_θ − log(π_ref/π_θ) − 1 in nats, a non-negative one-token estimate of KL(π_θ ‖ π_ref)."""
    log_ratio = clamp_log_ratio(ref_logps - logps)
    return log_ratio.exp() - log_ratio - 1


def aggregate(
    token_loss: Float[Tensor, "responses #length"],
    mask: Bool[Tensor, "responses length"],
    loss_type: str,
    num_items: int | float | Shaped[Tensor, ""] | None = None,
    max_completion_length: int | None = None,
) -> Float[Tensor, ""]:
    """Reduce token losses to a scalar (see TokenObjective's loss_type); responses without tokens add 0.

    Raises:
        ValueError: `dapo` lacks num_items, or `dr_grpo` lacks max_completion_length.
    """
    summed = (token_loss * mask).sum(1)
    if loss_type == "grpo":
        return (summed / mask.sum(1).clamp(min=1)).mean()
    if loss_type == "bnpo":
        return summed.sum() / mask.sum().clamp(min=1)
    if loss_type == "dapo":
        if num_items is None:
            raise ValueError("loss_type='dapo' divides by the tokens of the generation batch: pass num_items")
        return summed.sum() / torch.as_tensor(num_items, device=mask.device).clamp(min=1)
    if max_completion_length is None:
        raise ValueError("loss_type='dr_grpo' divides by max_completion_length: pass max_completion_length")
    return summed.mean() / max_completion_length


def _mean(x: Float[Tensor, "responses #length"], mask: Bool[Tensor, "responses length"]) -> Float[Tensor, ""]:
    weight = mask if x.shape == mask.shape else mask.any(1, keepdim=True)
    return (x * weight).sum() / weight.sum().clamp(min=1)
