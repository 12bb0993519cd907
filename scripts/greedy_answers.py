"""Greedy answers of a model to users' messages, or continuations of text."""

from typing import Any

import torch

from hybridmem.data.task_module import prompt_tokens
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.rl.rollouts.prompts import Prompt, batch_prompts
from hybridmem.rl.rollouts.sampling import Sampling, evaluating, sample


def answer(model: HybridMemForCausalLM, tokenizer: Any, messages: list[str], max_completion_length: int) -> list[str]:
    """Answer a batch of messages greedily, in the tokenizer's chat template if it has one."""
    end, chat = tokenizer.eos_token_id, tokenizer.chat_template is not None
    prompts = [Prompt(prompt_tokens(tokenizer, chat, text)) for text in messages]
    batch = batch_prompts(prompts, end, torch.device("cpu"))
    sampling = Sampling(max_completion_length=max_completion_length, temperature=0.0)
    with evaluating(model):
        answers = sample(model, batch, 1, sampling, [end], end)
    rows = zip(answers.ids, answers.mask, strict=True)
    return [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]
