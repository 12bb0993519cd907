"""A guard against collapse: reward narrows what a policy attends to, at times until nothing else can be found."""

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

from .policy_probe import is_due, record_answers

Action = Literal["warn", "raise_bonus", "stop"]
LAST_GOOD = "last_good.ckpt"
LOOKING_BACK = tuple(target for target in TARGETS if target != "allocation")
# Thresholds outside of what a value can be are always crossed or never.
RANGES = {
    "effective_span": (1, math.inf),
    "allocation_entropy": (0, math.log(len(KINDS))),
    "diversity": (0, math.log(2)),
}


class CollapseGuard(L.Callback):
    """Watches how widely and how variously a policy looks back, and acts when it narrows.

    Every look answers the same held-out prompts, with the same random numbers and as the policy samples, and logs
    means over their generated tokens and over layers:

    * collapse/effective_span: exp(entropy) of the head-averaged attention to earlier tokens, in tokens
    * collapse/allocation_entropy: entropy of the shares of persistent tokens, memory and window, in nats; of layers
      of variant mag and mac
    * collapse/diversity: mean JSD in nats between the attention of two responses to the same prompt
    * collapse/distinct_patterns: clusters of a prompt's responses by that JSD, at most `pattern_threshold` within one

    A value below its threshold in `patience` looks one after another is a collapse. `warn` says so, once until the
    value is back. `raise_bonus` multiplies AttentionRL's entropy_bonus, again after each further `patience` looks, up
    to `max_bonus`; it stays raised. `stop` ends the training. As long as nothing is below its threshold, `stop` writes
    last_good.ckpt in trainer.default_root_dir at each look, and leaves it alone from the first look that is: what it
    holds is the policy before the collapse.

    Args:
        action: `warn`, `raise_bonus` or `stop`.
        min_effective_span, min_allocation_entropy, min_diversity: the thresholds; None: logged, not watched.
        patience: looks below a threshold, one after another, before something is done.
        every_n_steps: optimiser steps between two looks; the first one is before training.
        layers: the layers that are watched, from the end if negative.
        target: the distribution whose span and diversity count: `attention`, or `memory` or `unified` (see
            AttentionRL).
        num_prompts: held-out prompts of a look, each answered as often as in training.
        pattern_threshold: the JSD in nats up to which two responses look back alike (see DistinctPatterns); a model
            whose diversity is far below needs a lower one, or every prompt has one pattern.
        bonus_factor: what the bonus is multiplied by.
        max_bonus: the bonus is not raised beyond.
        seed: of the looks' responses.

    Raises:
        ValueError: settings that cannot work, or, before the first batch, that this policy or its objectives cannot
            follow.
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
        self.below: dict[str, int] = {}  # looks below the threshold, one after another; nothing before the first look
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
                raise ValueError(f"min_{name}={least} must lie between {low} and {high:.4g}, or be null: not watched")
        if self.action != "warn" and not self.thresholds:
            raise ValueError(
                f"action={self.action!r} has nothing to act on: set min_effective_span, min_allocation_entropy or "
                "min_diversity"
            )
        if not 1 < self.bonus_factor < math.inf:
            raise ValueError(f"bonus_factor={self.bonus_factor} must be above 1: the bonus is multiplied by it")

    def state_dict(self) -> dict[str, Any]:
        """How long each value has been below, how often the bonus was raised, and the last good checkpoint."""
        return {"below": dict(self.below), "raises": self.raises, "last_good": self.last_good}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up."""
        self.below, self.raises = state_dict["below"], state_dict["raises"]
        self.last_good = state_dict["last_good"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check the settings against the policy; look at a new run; give a resumed one its raised bonus back."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"CollapseGuard watches PolicyModule, not {type(pl_module).__name__}: remove it")
        self.previous_step = trainer.global_step
        if self.action == "raise_bonus":
            self._take_bonus(pl_module)
        if self.below and (self.action != "stop" or self._has_last_good(trainer)):
            return
        values = self.measure(pl_module)
        self._check_start(values, pl_module.num_generations)
        self._judge(trainer, pl_module, values)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Save what the last look found good: after the validation that was due, so that a resumed run misses none."""
        if not self._save_due:
            return
        self._save_due = False
        path = Path(trainer.default_root_dir) / LAST_GOOD
        self.last_good = {"path": str(path), "step": trainer.global_step}
        trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: PolicyModule, *_: Any) -> None:
        """Look every `every_n_steps` optimiser steps."""
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
        """One look: the values by name, without those that no token has in these layers."""
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
                module.worker, example, module.num_generations, module.sampling, self.layers, generator,
                module.trainer.precision_plugin.forward_context(),
            )  # fmt: skip
            mask = answers.completions.mask
            for record in answers.records.values():
                p = distribution(record, self.target, mask.shape[1])
                looks_back = mask & (p.sum(-1) > 0)  # mac's segments begin with a token that has none before it
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
                f"min_allocation_entropy is set, but none of layers={list(self.layers)} is of variant mag or mac, and "
                "the others allocate nothing: set it to null, or choose other layers"
            )
        if "diversity" in self.thresholds and num_generations < 2:
            raise ValueError(
                "min_diversity is set, but num_generations=1: a response alone cannot differ; set it to null"
            )
        for name, least in self.thresholds.items():
            if self.action == "stop" and values.get(name, math.inf) < least:
                raise ValueError(
                    f"min_{name}={least}: the policy starts at {values[name]:.4g}, so there is no good checkpoint to "
                    "keep; lower it, or choose another action"
                )

    def _has_last_good(self, trainer: L.Trainer) -> bool:
        """Whether the checkpoint that a stop would go back to is there: a resumed run may have left it behind."""
        there = self.last_good is not None and Path(self.last_good["path"]).exists()
        return trainer.strategy.broadcast(there)

    def _judge(self, trainer: L.Trainer, module: PolicyModule, values: dict[str, float]) -> None:
        """Count, and act on what has been below for long enough."""
        for name, least in self.thresholds.items():
            if name in values:
                self.below[name] = self.below.get(name, 0) + 1 if values[name] < least else 0
        self._save_due = self.action == "stop" and not any(self.below.values())
        collapsed = [name for name in self.thresholds if name in values and self._is_ripe(self.below[name])]
        if not collapsed:
            return
        found = ", ".join(f"{name} {values[name]:.4g} below {self.thresholds[name]}" for name in collapsed)
        done = self._act(trainer, module)
        rank_zero_warn(f"collapse at step {trainer.global_step}, {found} for {self.patience} looks or more: {done}")

    def _is_ripe(self, looks: int) -> bool:
        """Whether so many looks below a threshold call for action: one warning is enough, the bonus may rise again."""
        if self.action == "warn":
            return looks == self.patience
        return looks > 0 and looks % self.patience == 0

    def _act(self, trainer: L.Trainer, module: PolicyModule) -> str:
        """Do what `action` says; returns it in words."""
        if self.action == "warn":
            return "training goes on"
        if self.action == "raise_bonus":
            if self._bonus() == self.max_bonus:
                return f"entropy_bonus is max_bonus={self.max_bonus} already"
            self.raises += 1
            self._set_bonus(module)
            return f"entropy_bonus is raised to {self._bonus():.4g}"
        trainer.should_stop = True
        assert self.last_good is not None
        return f"training stops; the last good checkpoint is {self.last_good['path']}, of step {self.last_good['step']}"

    def _take_bonus(self, module: PolicyModule) -> None:
        """Note what the settings say, and raise it as often as the run has done before."""
        bonus = next((o.entropy_bonus for o in module.objectives.values() if hasattr(o, "entropy_bonus")), None)
        if not bonus:
            raise ValueError(
                "action='raise_bonus' multiplies the entropy_bonus of AttentionRL: add AttentionRL to objectives with "
                "an entropy_bonus above 0"
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
        # From the settings' value each time: a resumed run then comes to the same number as one that was not stopped.
        assert self.base_bonus is not None
        return min(self.base_bonus * self.bonus_factor**self.raises, self.max_bonus)
