"""Looks at a policy between its steps: when they are due, and what it attends to while it answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hybridmem.rl.attention.recorder import AttentionRecorder, LayerRecord
from hybridmem.rl.rollouts.sampling import Completions, Sampling, completion_logps, evaluating, sample
from hybridmem.training.policy.agent_rollouts import act_out
from hybridmem.training.policy.module import PolicyModule


class Answers(NamedTuple):
    """Responses to one prompt, trajectories where the policy acts, and what some layers did at their tokens."""

    ids: Int[Tensor, "responses time"]  # the prompt's tokens, padding where patches stand, and the response's
    completions: Completions
    records: dict[int, LayerRecord]  # the queries are those of the response's tokens
    earned: Float[Tensor, " responses"] | None = None  # in environments


def is_due(step: int, previous: int, every_n_steps: int) -> bool:
    """Whether a multiple of `every_n_steps` was reached since `previous`: a batch may take several optimiser steps."""
    return step // every_n_steps > previous // every_n_steps


@torch.no_grad()
def record_answers(
    module: PolicyModule,
    example: dict[str, Any],
    num_generations: int,
    sampling: Sampling,
    layers: Sequence[int],
    generator: torch.Generator | None = None,
) -> Answers:
    """Answer an example's prompt without exploration, and record what `layers` attend to; the module is left as it was.

    Raises:
        ValueError: layers that cannot be recorded (see AttentionRecorder).
    """
    earned = None
    with evaluating(module.model), module.trainer.precision_plugin.forward_context():
        if module.acts:
            acted = act_out(module, [example], num_generations, sampling, generator)
            prompts, completions = module.prompt_batch(acted.prompts), acted.completions
            earned = module.reward([example] * num_generations, completions, acted.environments)[1].total
        else:
            prompts = module.prompt_batch([module.data.prompt(example)])
            completions = sample(
                module.model, prompts, num_generations, sampling, module.eos_token_ids, module.data.pad_id, generator
            )
        prompts = prompts.repeat(num_generations)
        with AttentionRecorder(module.model, layers) as recorder:
            completion_logps(module.model, prompts, completions, sampling.temperature)
    length = completions.ids.shape[1]
    records = {n: _last_queries(record, length) for n, record in recorder.records.items()}
    return Answers(torch.cat((prompts.input_ids, completions.ids), dim=1), completions, records, earned)


def _last_queries(record: LayerRecord, length: int) -> LayerRecord:
    """Keep the queries of the last tokens: a map of all of them would grow with the square of the prompt."""
    if record.attention is None:
        return record
    return replace(record, attention=replace(record.attention, q=record.attention.q[:, :, -length:]))
