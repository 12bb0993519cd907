"""Held-out prompts: what a policy answers, by its likeliest tokens and by samples, and whether that is right."""

from typing import Any

import torch
from torch import Tensor

from hybridmem.distributed import rank_and_size
from hybridmem.rl.rollouts.experience import Answered
from hybridmem.rl.rollouts.sampling import Sampling, generators

from .agent_rollouts import act_out

SOLVED = 1.0  # the reward of an environment in which the task is done
VALIDATION = 2  # what random numbers are for; rollouts have 0, refinements 1
Examples = list[dict[str, Any]]


def validate(module: Any, batch: Examples, batch_idx: int) -> Answered:
    """Reward and accuracy of the likeliest response to every held-out prompt; pass@1 of responses as in training.

    The random numbers are the same in every validation.
    """
    prompts = module.prompt_batch([module.data.prompt(example) for example in batch])
    texts, rewards = module.reward(batch, module.answer(prompts, 1, _likeliest(module)))
    _log(module, len(batch), reward=rewards.total.mean())
    each = _generators(module, batch_idx, len(batch))
    sampled, _ = module.texts_and_ids(module.answer(prompts, module.num_generations, module.sampling, each))
    answered = Answered(batch, texts, sampled)
    if "answer" in batch[0]:
        answered = answered.judged(module.data.task)
        _log(module, len(batch), **_right(answered))
    return answered


def validate_acting(module: Any, batch: Examples, batch_idx: int) -> Answered:
    """The same in environments, where an example is solved that earns 1 or more."""
    acted = act_out(module, batch, 1, _likeliest(module))
    texts, rewards = module.reward(batch, acted.completions, acted.environments)
    each = _generators(module, batch_idx, len(batch))
    tried = act_out(module, batch, module.num_generations, module.sampling, each)
    repeated = [example for example in batch for _ in range(module.num_generations)]
    sampled, earned = module.reward(repeated, tried.completions, tried.environments)
    answered = Answered(batch, texts, sampled, *((x.total >= SOLVED).tolist() for x in (rewards, earned)))
    _log(module, len(batch), reward=rewards.total.mean(), **_right(answered), turns=tried.turns.float().mean())
    return answered


def _likeliest(module: Any) -> Sampling:
    return Sampling(max_completion_length=module.sampling.max_completion_length, temperature=0.0)


def _generators(module: Any, batch_idx: int, count: int) -> list[torch.Generator]:
    """Random numbers of held-out prompts, by their place among all."""
    rank, size = rank_and_size()
    first = batch_idx * module.data.hparams.batch_size
    keys = [(module.seed, VALIDATION, (first + place) * size + rank) for place in range(count)]
    return generators(module.device, *keys)


def _right(answered: Answered) -> dict[str, float]:
    right = {"accuracy": answered.greedy_right, "pass@1": answered.sampled_right}
    return {name: sum(each) / len(each) for name, each in right.items()}


def _log(module: Any, batch_size: int, **values: Tensor | float) -> None:
    """Log means over the examples of all processes."""
    for name, value in values.items():
        shown = name in ("reward", "accuracy")
        module.log(f"val/{name}", value, batch_size=batch_size, prog_bar=shown, sync_dist=True)
