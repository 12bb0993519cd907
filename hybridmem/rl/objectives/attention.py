"""Attention as the policy: advantages weight its divergence from the rollout's attention (RAL, arXiv 2602.04884)."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hybridmem.rl.attention.distributions import distribution
from hybridmem.rl.attention.divergence import TINY, divergence_of
from hybridmem.rl.attention.exploration import Exploration, Noise, draw_noise, with_noise
from hybridmem.rl.attention.recorder import AttentionRecorder, LayerRecord, Records, recording
from hybridmem.rl.attention.targets import TARGETS
from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy
from hybridmem.rl.rollouts.prompts import Times
from hybridmem_kernels.attention_divergence import DIVERGENCES

from .objective import LossAndMetrics, ModelLoader, Objective

POSITIONS = ("generated", "predicting")


@dataclass(frozen=True, kw_only=True)
class AttentionRL(Objective):
    """Attention RL: weight · mean over generated t of A_t · divergence(p_θ,t ‖ p_old,t). The defaults are RAL's.

    Positive advantages pull the policy's attention towards the rollout's; negative ones push it away.

    Args:
        target: the distribution that acts as the policy: `attention`, `allocation`, `memory` or `unified`.
        weight: λ, the weight of this loss relative to the token objective.
        layers: indices of the layers whose divergences are averaged; negative indices count from the end.
        divergence: `jsd`, `kl` (p_θ covers p_old) or `reverse_kl`.
        positions: `generated` takes the queries at the generated tokens, as in RAL; `predicting` takes the queries
            that predict them, from the prompt's last token to the last generated token but one.
        entropy_bonus: weight of the distribution's entropy, in nats, which is subtracted from the loss.
        min_span: minimum effective span exp(entropy) in tokens; the shortfall, in nats, is added to the loss.
        exploration: standard deviation of the noise on the attention logits during the rollout; 0 in RAL.

    Raises:
        ValueError: A setting is out of range or unknown.
    """

    family: ClassVar[str] = "AttentionRL"
    prefix: ClassVar[str] = "attention/"
    learns_by_reward: ClassVar[bool] = True
    compares_with_rollout: ClassVar[bool] = True

    target: str = "attention"
    weight: float = 1.0
    layers: Sequence[int] = (-1,)
    divergence: str = "jsd"
    positions: str = "generated"
    entropy_bonus: float = 0.0
    min_span: int | float | None = None
    exploration: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (("target", TARGETS), ("divergence", DIVERGENCES), ("positions", POSITIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        if self.target == "unified" and self.exploration:
            raise ValueError(
                f"target='unified' does not support exploration={self.exploration}; set exploration=0, or target to "
                "attention, allocation or memory"
            )
        for name in ("weight", "entropy_bonus", "exploration"):
            value = getattr(self, name)
            if value is None or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be 0 or a positive number")
        if self.min_span is not None and not self.min_span >= 1:
            raise ValueError(f"min_span={self.min_span} must be at least 1, the span of a single token")

    @property
    def explores(self) -> bool:
        """Return True if responses are sampled with noise on their attention."""
        return bool(self.exploration)

    @property
    def trains_head(self) -> bool:
        """Return False: the loss reads attention only, so the LM head gets no gradient."""
        return False

    def check_run(self, steps_per_rollout: int, num_generations: int) -> None:
        """Raise a ValueError if the objective's gradient is zero in every step."""
        if self.weight and not self.exploration and steps_per_rollout == 1:
            raise ValueError(
                "AttentionRL's gradient is zero in the first optimiser step after a rollout, and this run takes only "
                "one: set num_iterations or steps_per_generation to 2 or more, or AttentionRL's exploration above 0"
            )

    def check_others(self, others: list[Objective]) -> None:
        """Raise a ValueError if the prompt's last query, which predicts the first token, will not be recorded."""
        if self.positions == "predicting" and any(other.splits_reading for other in others):
            raise ValueError(
                "positions=predicting cannot be combined with an allocation's prefill=full, which reads prompts "
                "separately: set positions to generated, or prefill to allocated"
            )

    def prepare(self, policy: Policy, load: ModelLoader) -> None:
        """Raise a ValueError if the model lacks one of the layers, or if one cannot be recorded."""
        AttentionRecorder(policy.model, self.layers)

    def act(
        self, policy: Policy, num_generations: int, time: int, generators: list[torch.Generator]
    ) -> Exploration | None:
        """Draw the noise on each response's attention logits; return None without exploration."""
        if not self.exploration:
            return None
        layers = list(AttentionRecorder(policy.model, self.layers).layers)
        noise = draw_noise(
            policy.model, self.target, layers, self.exploration, len(generators), num_generations, time, generators
        )
        return Exploration(self.target, noise)

    def observe(self, model: Any, times: int | Times) -> AbstractContextManager[Records]:
        """Return a context that records the layers' attention during a forward pass."""
        return recording(model, self.layers, times)

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the loss of a batch of responses and its metrics (see `compute_loss`)."""
        action: Any = batch.actions.get(self.family)
        noise = None if action is None else action.noise
        records, old_records = scores.seen[self.family], old.seen[self.family]
        return self.compute_loss(records, old_records, batch.advantages, batch.mask, noise)

    def compute_loss(
        self,
        records: dict[int, LayerRecord],
        old_records: dict[int, LayerRecord],
        advantages: Float[Tensor, " responses"],
        mask: Bool[Tensor, "responses length"],
        noise: Noise | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the loss of some responses and its metrics.

        Args:
            records: the policy's records of prompts and responses, by layer.
            old_records: the sampling policy's records of the same rows, by layer.
            advantages: one advantage per response.
            mask: the generated tokens that carry loss, among the last `length` tokens of each row.
            noise: the noise that the rollout added to the attention logits, up to each row's last token; old_records
                do not include it.

        Returns:
            The loss, and the detached means over tokens of `divergence`, `entropy` and `effective_span`.
        """
        divergences, entropies = zip(
            *(self._compare(records[n], old_records[n], mask, None if noise is None else noise[n]) for n in records),
            strict=True,
        )
        divergence, entropy = torch.stack(divergences).mean(0), torch.stack(entropies).mean(0)
        token_loss = self.weight * advantages[:, None] * divergence - self.entropy_bonus * entropy
        if self.min_span is not None:
            token_loss = token_loss + torch.relu(math.log(self.min_span) - entropy)
        count = mask.sum().clamp(min=1)
        metrics = {"divergence": divergence, "entropy": entropy, "effective_span": entropy.exp()}
        return (token_loss * mask).sum() / count, {
            name: ((value * mask).sum() / count).detach() for name, value in metrics.items()
        }

    def _compare(
        self,
        record: LayerRecord,
        old: LayerRecord,
        mask: Bool[Tensor, "responses length"],
        noise: Float[Tensor, "responses heads *time"] | None,
    ) -> tuple[Float[Tensor, "responses length"], Float[Tensor, "responses length"]]:
        """Return one layer's divergence and entropy at the tokens that carry loss."""
        length, shift = mask.shape[1], int(self.positions == "predicting")
        if self.target == "attention" and record.attention is not None and old.attention is not None:
            then = old.attention if noise is None else with_noise(old.attention, noise)
            then = then.over_tokens(record.attention.num_tokens)
            now, then = (side.last_queries(length, shift) for side in (record.attention, then))
            stats = now.compare(then, mask, self.divergence)
            return stats.jsd, stats.entropy
        p, p_old = (distribution(side, self.target, length + shift)[:, :length] for side in (record, old))
        return divergence_of(p, p_old, self.divergence), -(p * p.clamp(min=TINY).log()).sum(-1)
