"""Log-probabilities of responses with one prefill per group."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from hybridmem.rl.attention.action import Action, prefilled_once, reading

from .completions import Completions
from .prompts import PromptBatch, Times
from .sampling import inputs_of, read


def first_rows(times: int | Times, rows: int) -> Int[Tensor, " prompts"]:
    """Return the row of each prompt's first response; `times` adjacent responses share a prompt."""
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
    """Return the log-probability of each generated token, and the entropy of its distribution.

    Args:
        model: the policy.
        prompts: one prompt per response, repeated within groups.
        completions: the responses.
        temperature: divides the logits; 0 counts as 1.
        times: the number of adjacent responses that share a prompt, or one number per group if group sizes differ.
            Prompts of two or more tokens are then prefilled once per group, with gradients through the shared cache.
            1 makes each response read its own prompt.
        actions: choices under which the responses are read, with one row per response.
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
    # No token that carries loss attends past EOS, so padding after it needs no mask.
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


def last_hidden_states(
    model: Any, prompts: PromptBatch, completions: Completions
) -> Float[Tensor, "responses length hidden"]:
    """Return the base model's last hidden states at the positions that predict the generated tokens."""
    length = completions.ids.shape[1]
    rows = prompts.followed_by(completions.ids)
    inputs = inputs_of(model, rows)
    return model.base_model(**inputs, use_cache=False).last_hidden_state[:, -length - 1 : -1]
