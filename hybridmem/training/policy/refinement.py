"""Refinements of failed responses, as Critique-GRPO learns from them."""

import logging
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hybridmem.distributed import rank_and_size
from hybridmem.rl.objectives.critique import CritiqueGRPO
from hybridmem.rl.rollouts.experience import Rollout
from hybridmem.rl.rollouts.sampling import Completions, concatenate

REFINEMENTS = 1  # apart from the rollout's own random numbers
logger = logging.getLogger(__name__)


@torch.no_grad()
def with_refinements(
    module: Any, objective: CritiqueGRPO, examples: list[dict[str, Any]], texts: list[str], rollout: Rollout
) -> Rollout:
    """A rollout with the refinements that the objective asks for, each behind its group or in its first places.

    Measures, under critique/: the share of groups that were refined, of these the share with a right refinement, how
    many refinements were sampled, and how many responses had none because there was no critique or no room for one.

    Args:
        module: the PolicyModule that sampled.
        examples: one of each group.
        texts: the responses.
    """
    times = module.num_generations
    correct = rollout.rewards >= objective.correct_reward
    groups = objective.to_refine(correct.view(-1, times))
    rows = groups.repeat_interleave(times).nonzero().squeeze(1).tolist()
    asked = _ask_again(module, objective, examples, texts, correct, rows)
    module.measure("critique/refined_groups", groups.float().mean())
    _, size = rank_and_size()  # the mean over processes of size times a count is the sum
    module.measure("critique/unrefined", float(size * (len(rows) - len(asked))))
    module.measure("critique/sampled", float(size * len(asked)))
    if not asked:
        return rollout
    prompts = module.prompt_batch([prompt for _, prompt in asked])
    keys = [divmod(row, times) for row, _ in asked]
    refinements = module.answer(prompts, 1, module.sampling, module.generators(REFINEMENTS, keys))
    group_of = torch.tensor([row // times for row, _ in asked])
    _, rewards = module.reward([examples[group] for group in group_of.tolist()], refinements)
    chosen = best_of_groups(rewards.total, group_of, objective.num_refinements)
    right = group_of[rewards.total >= objective.correct_reward].unique()
    module.measure("critique/rescued_groups", len(right) / int(groups.sum()), int(groups.sum()))
    kept = Completions(*(x[chosen.to(x.device)] for x in refinements))
    return joined(rollout, kept, rewards.total[chosen], group_of[chosen], objective, times, module.data.pad_id)


def _ask_again(
    module: Any, objective: CritiqueGRPO, examples: list[dict], texts: list[str], correct: Tensor, rows: list[int]
) -> list[tuple[int, Any]]:
    """The responses that can be refined, each with the prompt that asks for it."""
    if not rows:
        return []
    repeated = [examples[row // module.num_generations] for row in rows]
    columns = {name: [example[name] for example in repeated] for name in repeated[0] if name != "prompt"}
    critiques = objective.critic(
        prompts=[example["prompt"] for example in repeated], completions=[texts[row] for row in rows],
        correct=correct[rows].tolist(), **columns,
    )  # fmt: skip
    if len(critiques) != len(rows):
        raise ValueError(f"the critic gave {len(critiques)} critiques for {len(rows)} responses; it must give one each")
    asked = []
    for row, example, critique in zip(rows, repeated, critiques, strict=True):
        if critique is None:
            continue
        text = objective.template.format(prompt=example["prompt"], response=texts[row], critique=critique)
        try:
            asked.append((row, module.data.prompt({**example, "prompt": text})))
        except ValueError as error:  # longer than max_prompt_length
            logger.warning("a response is not refined: %s", error)
    return asked


def best_of_groups(rewards: Tensor, group_of: Int[Tensor, " responses"], count: int) -> Int[Tensor, " chosen"]:
    """The rows of each group's `count` highest rewards, earlier ones first among equals, in the order of the groups."""
    order = rewards.argsort(descending=True, stable=True)
    order = order[group_of[order].argsort(stable=True)]
    groups = group_of[order]
    first = torch.searchsorted(groups, groups)
    return order[torch.arange(len(order)) - first < count]


def joined(
    rollout: Rollout,
    refinements: Completions,
    rewards: Tensor,
    group_of: Int[Tensor, " refinements"],
    objective: CritiqueGRPO,
    times: int,
    pad_id: int,
) -> Rollout:
    """A rollout of groups of `times` and the refinements of some, in the order of the groups."""
    initial = torch.arange(len(rollout.rewards)) // times
    kept = torch.ones(len(initial), dtype=torch.bool)
    if objective.join == "replace":
        place = torch.arange(len(group_of)) - torch.searchsorted(group_of, group_of)
        kept[group_of * times + place] = False
    whole = concatenate([Completions(*(x[kept.to(x.device)] for x in rollout.completions)), refinements], pad_id)
    groups = torch.cat((initial[kept], group_of))
    refined: Bool[Tensor, " responses"] = torch.arange(len(groups)) >= int(kept.sum())
    order = groups.argsort(stable=True)
    return Rollout(
        rollout.prompts,
        Completions(*(x[order.to(x.device)] for x in whole)),
        torch.cat((rollout.rewards[kept], rewards))[order],
        sizes=groups.bincount(minlength=len(rollout.prompts)),
        refined=refined[order],
    )
