"""Guard against attention collapse, in which reward narrows attention until exploration ends."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from hybridmem.metrics.diversity import AttentionDiversity, DistinctPatterns, check_threshold
from hybridmem.metrics.entropy import AllocationEntropy, EffectiveSpan
from hybridmem.rl.attention.distributions import allocation, distribution
from hybridmem.rl.attention.targets import KINDS, TARGETS
from hybridmem.training.policy.module import PolicyModule

from .policy_probe import is_due, probing, record_answers

Action = Literal["warn", "raise_bonus", "stop"]
LAST_GOOD = "last_good.ckpt"
LOOKING_BACK = tuple(target for target in TARGETS if target != "allocation")
# Possible values of each metric: thresholds outside this range would always or never trigger.
RANGES = {
    "effective_span": (1, math.inf),
    "allocation_entropy": (0, math.log(len(KINDS))),
    "diversity": (0, math.log(2)),
}


class CollapseGuard(L.Callback):
    """Callback that measures the span and diversity of a policy's attention, and acts when they collapse.

    Each probe answers the same held-out prompts with the policy's sampling parameters and fixed random numbers. It logs
    means over generated tokens and layers:

    * collapse/effective_span: exp(entropy) of the head-averaged attention to earlier tokens, in tokens
    * collapse/allocation_entropy: entropy in nats of the allocation over persistent tokens, memory and window, for
      layers of variant mag and mac
    * collapse/diversity: mean JSD in nats between the attention of two responses to the same prompt
    * collapse/distinct_patterns: number of clusters among a prompt's responses, with a JSD of at most
      `pattern_threshold` within a cluster

    A metric below its threshold in `patience` consecutive probes is a collapse. `warn` warns once, and again only after
    the metric has recovered. `raise_bonus` multiplies AttentionRL's entropy_bonus, again after every further `patience`
    probes, up to `max_bonus`, and never lowers it. `stop` ends training. At each probe with all metrics above their
    thresholds, `stop` writes last_good.ckpt to trainer.default_root_dir; the file therefore holds the policy before the
    collapse.

    Args:
        action: `warn`, `raise_bonus` or `stop`.
        min_effective_span: threshold of the effective span, in tokens. None: log it without acting.
        min_allocation_entropy: threshold of the allocation entropy, in nats. None: log it without acting.
        min_diversity: threshold of the diversity, in nats. None: log it without acting.
        patience: consecutive probes below a threshold before the action.
        every_n_steps: optimiser steps between two probes; the first probe is before training.
        layers: layers to measure; negative numbers count from the end.
        target: distribution for span and diversity: `attention`, `memory` or `unified` (see AttentionRL).
        num_prompts: held-out prompts per probe, each answered num_generations times.
        pattern_threshold: maximum JSD in nats between responses with one pattern (see DistinctPatterns). Lower it for a
            model with a much lower diversity, or every prompt has a single pattern.
        bonus_factor: factor of each raise.
        max_bonus: upper limit of the bonus.
        seed: seed of the probes' responses.

    Raises:
        ValueError: a setting is out of range, or, before the first batch, does not suit the policy or its objectives.
    """

    def __init__(
        self,
        action: Action = "warn",
        min_effective_span: float | None = None,
        min_allocation_entropy: float | None = None,
        min_diversity: float | None = None,
        patience: int = 3,
        every_n_steps: int = 50,
        layers: Sequence[int] = (-1,),
        target: str = "attention",
        num_prompts: int = 4,
        pattern_threshold: float = 0.1,
        bonus_factor: float = 2.0,
        max_bonus: float = 0.1,
        seed: int = 0,
    ):
        self.action, self.patience, self.every_n_steps = action, patience, every_n_steps
        self.layers, self.target, self.num_prompts = layers, target, num_prompts
        self.bonus_factor, self.max_bonus, self.seed = bonus_factor, max_bonus, seed
        self.pattern_threshold = pattern_threshold
        thresholds = {
            "effective_span": min_effective_span,
            "allocation_entropy": min_allocation_entropy,
            "diversity": min_diversity,
        }
        self.thresholds = {name: least for name, least in thresholds.items() if least is not None}
        self._check_settings()
        self.below: dict[str, int] = {}  # consecutive probes below the threshold; empty before the first probe
        self.raises = 0
        self.base_bonus: float | None = None
        self.last_good: dict[str, Any] | None = None  # path and step
        self.previous_step = 0
        self._save_due = False

    def _check_settings(self) -> None:
        for name, choices in (("action", get_args(Action)), ("target", LOOKING_BACK)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        for name in ("patience", "every_n_steps", "num_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_threshold(pattern_threshold=self.pattern_threshold)
        for name, least in self.thresholds.items():
            low, high = RANGES[name]
            if not low < least < high:
                raise ValueError(f"min_{name}={least} must be between {low} and {high:.4g}, or null to only log it")
        if self.action != "warn" and not self.thresholds:
            raise ValueError(
                f"action={self.action!r} needs a threshold; set min_effective_span, min_allocation_entropy or "
                "min_diversity"
            )
        if not 1 < self.bonus_factor < math.inf:
            raise ValueError(f"bonus_factor={self.bonus_factor} must be above 1, so that it raises the bonus")

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of probes below thresholds and of raises, and the last good checkpoint."""
        return {"below": dict(self.below), "raises": self.raises, "last_good": self.last_good}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts and the last good checkpoint."""
        self.below, self.raises = state_dict["below"], state_dict["raises"]
        self.last_good = state_dict["last_good"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the settings against the policy, restore a resumed run's bonus, and probe a new run."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"CollapseGuard supports PolicyModule, not {type(pl_module).__name__}; remove it")
        self.previous_step = trainer.global_step
        if self.action == "raise_bonus":
            self._take_bonus(pl_module)
        if self.below and (self.action != "stop" or self._has_last_good(trainer)):
            return
        values = self.measure(pl_module)
        self._check_start(values, pl_module.num_generations)
        self._judge(trainer, pl_module, values)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Save the checkpoint of a good probe, after any validation that was due, so that a resumed run skips none."""
        if not self._save_due:
            return
        self._save_due = False
        path = Path(trainer.default_root_dir) / LAST_GOOD
        self.last_good = {"path": str(path), "step": trainer.global_step}
        trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: PolicyModule, *_: Any) -> None:
        """Probe the policy every `every_n_steps` optimiser steps."""
        step, previous = trainer.global_step, self.previous_step
        self.previous_step = step
        if not is_due(step, previous, self.every_n_steps):
            return
        values = self.measure(pl_module)
        pl_module.log_dict({f"collapse/{name}": value for name, value in values.items()})
        self._judge(trainer, pl_module, values)
        if self.action == "raise_bonus":
            pl_module.log("collapse/entropy_bonus", self._bonus())

    def measure(self, module: PolicyModule) -> dict[str, float]:
        """Probe the policy and return the metrics by name, without those that these layers do not have."""
        metrics = {
            "effective_span": EffectiveSpan().to(module.device),
            "allocation_entropy": AllocationEntropy().to(module.device),
            "diversity": AttentionDiversity().to(module.device),
            "distinct_patterns": DistinctPatterns(self.pattern_threshold).to(module.device),
        }
        generator = torch.Generator(module.device).manual_seed(self.seed)
        for index in range(self.num_prompts):
            example = module.data.task.example("val", index)
            answers = record_answers(
                module.worker,
                example,
                module.num_generations,
                module.sampling,
                self.layers,
                generator,
                probing(module.trainer),
            )
            mask = answers.completions.mask
            for record in answers.records.values():
                p = distribution(record, self.target, mask.shape[1])
                looks_back = mask & (p.sum(-1) > 0)  # the first token of a mac segment has no earlier token
                metrics["effective_span"].update(p[:, None], looks_back)
                metrics["diversity"].update(p, looks_back)
                metrics["distinct_patterns"].update(p, looks_back)
                if record.variant in ("mag", "mac"):
                    metrics["allocation_entropy"].update(allocation(record, mask.shape[1]), mask)
        values = {name: metric.compute().item() for name, metric in metrics.items() if metric.update_called}
        return {name: value for name, value in values.items() if not math.isnan(value)}

    def _check_start(self, values: dict[str, float], num_generations: int) -> None:
        if "allocation_entropy" in self.thresholds and "allocation_entropy" not in values:
            raise ValueError(
                f"min_allocation_entropy={self.thresholds['allocation_entropy']} needs a layer of variant mag or mac, "
                f"and layers={list(self.layers)} has none; set it to null, or choose other layers"
            )
        if "diversity" in self.thresholds and num_generations < 2:
            raise ValueError(
                "min_diversity compares responses to a prompt, but num_generations=1; set min_diversity to null, or "
                "raise num_generations"
            )
        for name, least in self.thresholds.items():
            if self.action == "stop" and values.get(name, math.inf) < least:
                raise ValueError(
                    f"min_{name}={least} is above the initial policy's {values[name]:.4g}, so action=stop has no good "
                    f"checkpoint to keep; lower min_{name}, or choose another action"
                )

    def _has_last_good(self, trainer: L.Trainer) -> bool:
        """Return True if last_good.ckpt exists, which a resumed run may have lost."""
        there = self.last_good is not None and Path(self.last_good["path"]).exists()
        return trainer.strategy.broadcast(there)

    def _judge(self, trainer: L.Trainer, module: PolicyModule, values: dict[str, float]) -> None:
        """Update the counts, and act on metrics below their threshold for `patience` probes."""
        for name, least in self.thresholds.items():
            if name in values:
                self.below[name] = self.below.get(name, 0) + 1 if values[name] < least else 0
        self._save_due = self.action == "stop" and not any(self.below.values())
        collapsed = [name for name in self.thresholds if name in values and self._is_ripe(self.below[name])]
        if not collapsed:
            return
        found = ", ".join(f"{name} {values[name]:.4g} below {self.thresholds[name]}" for name in collapsed)
        done = self._act(trainer, module)
        rank_zero_warn(f"collapse at step {trainer.global_step}, {found} for {self.patience} probes or more: {done}")

    def _is_ripe(self, looks: int) -> bool:
        """Return True if this number of probes triggers the action; warnings trigger once, raises repeatedly."""
        if self.action == "warn":
            return looks == self.patience
        return looks > 0 and looks % self.patience == 0

    def _act(self, trainer: L.Trainer, module: PolicyModule) -> str:
        """Perform the action, and return its description."""
        if self.action == "warn":
            return "training continues"
        if self.action == "raise_bonus":
            if self._bonus() == self.max_bonus:
                return f"entropy_bonus is already at max_bonus={self.max_bonus}"
            self.raises += 1
            self._set_bonus(module)
            return f"raised entropy_bonus to {self._bonus():.4g}"
        trainer.should_stop = True
        assert self.last_good is not None
        return f"stopping; the last good checkpoint is {self.last_good['path']}, from step {self.last_good['step']}"

    def _take_bonus(self, module: PolicyModule) -> None:
        """Read the bonus from the settings, and apply the raises of a resumed run."""
        bonus = next((o.entropy_bonus for o in module.objectives.values() if hasattr(o, "entropy_bonus")), None)
        if not bonus:
            raise ValueError(
                "action='raise_bonus' needs AttentionRL with an entropy_bonus above 0; add it to objectives, or choose "
                "another action"
            )
        if self.base_bonus is None:
            self.base_bonus = bonus
        if self.base_bonus >= self.max_bonus:
            raise ValueError(f"max_bonus={self.max_bonus} must be above AttentionRL's entropy_bonus={self.base_bonus}")
        self._set_bonus(module)

    def _set_bonus(self, module: PolicyModule) -> None:
        for family, objective in module.objectives.items():
            if hasattr(objective, "entropy_bonus"):
                module.objectives[family] = replace(cast(Any, objective), entropy_bonus=self._bonus())

    def _bonus(self) -> float:
        # Computed from the initial value, so that resumed and uninterrupted runs reach the same number.
        assert self.base_bonus is not None
        return min(self.base_bonus * self.bonus_factor**self.raises, self.max_bonus)
