"""Log-probabilities of responses; a group reads its prompt once."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from hybridmem.rl.attention.action import Action, prefilled_once, reading

from .completions import Completions
from .prompts import PromptBatch, Times
from .sampling import read


def first_rows(times: int | Times, rows: int) -> Int[Tensor, " prompts"]:
    """Where each prompt's responses begin, of which there are `times` next to one another."""
    if isinstance(times, Tensor):
        return times.cumsum(0) - times
    return torch.arange(0, rows, times)


def completion_logps(
    model: Any,
    prompts: PromptBatch,
    completions: Completions,
    temperature: float,
    times: int | Times = 1,
    actions: Sequence[Action] = (),
) -> tuple[Float[Tensor, "responses length"], Float[Tensor, "responses length"]]:
    """Log-probabilities of the generated tokens, and the entropy at each.

    Args:
        model: the policy.
        prompts: of each response, repeated.
        completions: the responses.
        temperature: that the logits are divided by; 0 counts as 1.
        times: how many responses, next to one another, answer one prompt; a number each where they are not as many.
            The prompt is then read once for them all, gradients included, where it has a token before its last one;
            1: each response reads its own.
        actions: choices that the responses are read with, one row a response.
    """
    if actions and prefilled_once(actions):
        logits = _behind_shared_prompts(model, prompts, completions, times, actions)
    else:
        with reading(actions, model, "response"):
            logits = _behind_prompts(model, prompts, completions, 1 if actions else times)
    logps = (logits / (temperature or 1.0)).log_softmax(-1)
    chosen = logps.gather(2, completions.ids.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(logps.exp() * logps).sum(-1)
    return chosen, entropy


def _behind_prompts(
    model: Any, prompts: PromptBatch, completions: Completions, times: int | Times
) -> Float[Tensor, "responses length vocab"]:
    """Return the logits of the generated tokens; responses may share a reading of all but their prompt's last token."""
    length, cache = completions.ids.shape[1], None
    shared = isinstance(times, Tensor) or times > 1
    # No unmasked token attends past the end of its response.
    rows = prompts.followed_by(completions.ids)
    if shared and prompts.input_ids.shape[1] > 1:
        cache = DynamicCache(config=model.config.get_text_config())
        read(model, prompts.select(first_rows(times, len(rows.input_ids))).without_last(), cache)
        repeats: Any = times.to(rows.input_ids.device) if isinstance(times, Tensor) else times  # a cache takes both
        cache.batch_repeat_interleave(repeats)
        rows = rows.last(length + 1)
    return read(model, rows, cache, logits_to_keep=length + 1)[:, :-1]


def _behind_shared_prompts(
    model: Any, prompts: PromptBatch, completions: Completions, times: int | Times, actions: Sequence[Action]
) -> Float[Tensor, "responses length vocab"]:
    """Return the logits of the generated tokens as the rollout read them: first whole prompts, then responses."""
    length, cache = completions.ids.shape[1], DynamicCache(config=model.config.get_text_config())
    first = first_rows(times, len(completions.ids)).to(completions.ids.device)
    with reading(actions, model, "prompt"):
        behind_prompt = read(model, prompts.select(first), cache)
    repeats: Any = times.to(first.device) if isinstance(times, Tensor) else times
    cache.batch_repeat_interleave(repeats)
    with reading(actions, model, "response"):  # the last token, too: its attention may be recorded
        logits = read(model, prompts.followed_by(completions.ids).last(length), cache, logits_to_keep=length)
    return torch.cat((behind_prompt.repeat_interleave(repeats, dim=0), logits[:, :-1]), dim=1)
