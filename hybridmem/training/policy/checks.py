"""Checks of an RL run's settings before it samples."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from hybridmem.checks import at_least, one_of
from hybridmem.rl.environments.tools import CALL_FORMATS
from hybridmem.rl.objectives.objective import Objective
from hybridmem.training.schedules import check_schedule

from .rollout_worker import RolloutWorker

CONTRASTED = 10  # batches of prompts whose rewards may all be equal before a run is refused


def by_family(objectives: Sequence[Objective]) -> dict[str, Objective]:
    """Return a run's objectives by family.

    Raises:
        ValueError: there is no objective, two share a family, or some are incompatible.
    """
    if not objectives:
        raise ValueError(
            "objectives is empty; add a token objective (GRPO, …), AttentionRL or AttentionDistillation, alone or "
            "combined, or SFT or RejectionFineTune alone"
        )
    found: dict[str, Objective] = {}
    for objective in objectives:
        count = sum(other.family == objective.family for other in objectives)
        if count > 1:
            raise ValueError(f"objectives has {count} of family {objective.family}; keep one")
        if objective.alone is not None and len(objectives) > 1:
            name = type(objective).__name__
            raise ValueError(f"objectives: {name} {objective.alone}: remove it, or the others")
        found[objective.family] = objective
    if len({objective.samples for objective in objectives}) > 1:
        raise ValueError("objectives: some learn from given answers and others from samples; keep one kind")
    return found


def check_settings(
    objectives: dict[str, Objective],
    num_generations: int,
    num_iterations: int,
    steps_per_generation: int,
    max_turns: int,
    call_format: str,
    max_observation_length: int,
    max_empty_rollouts: int,
) -> None:
    """Raise a ValueError for settings that are incompatible or have no effect."""
    for name, value in dict(
        num_generations=num_generations, num_iterations=num_iterations, steps_per_generation=steps_per_generation
    ).items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    at_least(1, max_turns=max_turns, max_observation_length=max_observation_length)
    at_least(1, max_empty_rollouts=max_empty_rollouts)
    one_of(CALL_FORMATS, call_format=call_format)
    if num_generations < 2 and any(objective.learns_by_reward for objective in objectives.values()):
        raise ValueError(
            f"num_generations={num_generations} gives every response an advantage of 0; set it to 2 or more"
        )
    for objective in objectives.values():
        objective.check_run(num_iterations * steps_per_generation, num_generations)
        objective.check_others([other for other in objectives.values() if other is not objective])
    _check_sampling(objectives)


def _check_sampling(objectives: dict[str, Objective]) -> None:
    """Raise a ValueError for objectives with incompatible ways of sampling."""
    explore, replace = explorations(objectives), any(o.dynamic_sampling for o in objectives.values())
    if explore and replace:
        raise ValueError(f"{explore[0]} is incompatible with dynamic_sampling; turn one of the two off")
    if len(explore) > 1:
        raise ValueError(f"{' and '.join(explore)} cannot be combined; keep one (exploration: 0 turns it off)")
    for name in refinements(objectives):
        if explore:
            raise ValueError(
                f"{explore[0]} is incompatible with {name}, which samples refinements without it; set exploration to "
                "0, or use DrGRPO"
            )
        if replace:
            raise ValueError(f"dynamic_sampling drops the groups that {name} refines; set it to false")


def explorations(objectives: dict[str, Objective]) -> list[str]:
    """Return the names of the objectives' explorations and allocations, which require sampling by the trainer."""
    return [f"{type(o).__name__}'s {o.choice}" for o in objectives.values() if o.explores]


def refinements(objectives: dict[str, Objective]) -> list[str]:
    """Return the names of objectives that refine responses, which only works for single turns."""
    return [type(objective).__name__ for objective in objectives.values() if objective.refines]


def check_acting(objectives: dict[str, Objective]) -> None:
    """Raise a ValueError if an objective does not support environments."""
    choosing = {name: o for name, o in objectives.items() if not o.chooses_in_environments}
    for name in [*explorations(choosing), *refinements(objectives)]:
        raise ValueError(f"{name} supports single turns only; remove it, or the environment")


def check_strategy(strategy: Any, objectives: dict[str, Objective]) -> None:
    """Raise a ValueError if gradients would be missing: DDP would wait for them, and sharded models lose them."""
    settings = getattr(strategy, "_ddp_kwargs", {})
    trained = [objective for objective in objectives.values() if objective.trains_model]
    trains_head = not trained or any(objective.trains_head for objective in trained)
    if isinstance(strategy, DDPStrategy) and not trains_head and not settings.get("find_unused_parameters"):
        raise ValueError(
            "trainer.strategy=ddp needs a gradient of every parameter, but attention objectives alone give the LM head "
            "none; set it to ddp_find_unused_parameters_true"
        )
    splitting = [objective for objective in objectives.values() if objective.splits_reading]
    if isinstance(strategy, ModelParallelStrategy) and splitting and trained:
        raise ValueError(
            "prefill=full trains through a cache, whose gradients a sharded model loses: set prefill to allocated, or "
            "trainer.strategy to ddp"
        )


def check_frozen(dtype: str, frozen: bool) -> None:
    """Raise a ValueError if weights that are trained would be stored in a lower precision."""
    if not frozen:
        raise ValueError(
            f"dtype={dtype} is only for weights that are not trained; set lora, or trainer.precision to bf16-mixed"
        )


def check_adapters(frozen: bool) -> None:
    """Raise a ValueError if no objective would train the adapters."""
    if frozen:
        raise ValueError(
            "lora adds adapters, but no objective trains the model: add a token objective or AttentionRL, or set lora "
            "to null"
        )


def check_rewards(worker: RolloutWorker, examples: Callable[[int], list[dict[str, Any]]]) -> None:
    """Raise a ValueError if rewards are constant under the most different actions of an objective.

    Args:
        worker: samples and rewards responses.
        examples: returns the n-th batch of examples.
    """
    for family, objective in worker.objectives.items():
        if not objective.explores:
            continue
        seen, count = set[float](), 0
        for number in range(CONTRASTED):
            batch = examples(number)
            rewards = worker.contrasted(batch, family, number)
            if rewards is None:
                break
            seen, count = seen | set(rewards.tolist()), count + len(batch)
            if len(seen) > 1:
                break
        else:
            name = type(objective).__name__
            raise ValueError(
                f"{name} learns nothing from a constant reward: with every unit open or closed, all responses to "
                f"{count} prompts earned {seen.pop():g}; choose other prompts or rewards, or another model"
            )


def check_answers(objectives: dict[str, Objective], example: dict[str, Any]) -> None:
    """Raise a ValueError if an objective needs answers and the task's examples have none."""
    for objective in objectives.values():
        if not objective.samples and "answer" not in example:
            name = type(objective).__name__
            raise ValueError(f"{name} learns from the column answer, which the task's examples lack; choose another")


def check_learning(objectives: dict[str, Objective], frozen: bool, lora: dict[str, Any] | None) -> None:
    """Raise a ValueError if no objective trains any parameter."""
    names = " and ".join(type(objective).__name__ for objective in objectives.values())
    learning = [objective for objective in objectives.values() if objective.learns]
    if not learning:
        raise ValueError(f"objectives: {names} learns nothing; add a token objective, or run hybridmem validate")
    if frozen and lora is not None:
        raise ValueError(f"frozen=true leaves the adapters of lora={lora} untrained; remove one of the two")
    if frozen and all(objective.trains_model for objective in learning):
        raise ValueError(f"frozen=true leaves {names} nothing to train; add AllocationRL, or set it to false")


def check_prompts(data: Any, model: Any) -> None:
    """Raise a ValueError if the data has no prompts or the model cannot read them; `model` may still be None."""
    if data.hparams.get("mode") != "prompts":
        raise ValueError("PolicyModule trains on prompts; set data.init_args.mode to prompts")
    if model is None:
        return
    vocab_size = model.config.get_text_config().vocab_size
    if data.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer's largest id is {data.vocab_size - 1}, but the model's vocab_size is {vocab_size}; set "
            "data.init_args.tokenizer to the model's own tokenizer"
        )


def check_end(lr_scheduler: Any, trainer: L.Trainer) -> None:
    """Raise a ValueError if trainer.max_steps is missing or too small for the learning-rate schedule."""
    if trainer.max_steps < 1:
        raise ValueError(
            f"trainer.max_steps={trainer.max_steps} must be at least 1; set it to the number of optimiser steps"
        )
    check_schedule(lr_scheduler, trainer)
