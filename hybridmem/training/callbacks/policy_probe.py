"""Probes of a policy during training that record the attention of its answers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hybridmem.rl.attention.action import reading
from hybridmem.rl.attention.recorder import AttentionRecorder, LayerRecord
from hybridmem.rl.rollouts.agent_rollouts import act_out
from hybridmem.rl.rollouts.completions import Completions
from hybridmem.rl.rollouts.policy import Example
from hybridmem.rl.rollouts.sampling import Sampling, evaluating
from hybridmem.rl.rollouts.scoring import completion_logps
from hybridmem.training.non_finite import stopping_at_non_finite_logits
from hybridmem.training.policy.rollout_worker import RolloutWorker


class Answers(NamedTuple):
    """Responses to one prompt, or trajectories in environments, with records of some layers at their tokens."""

    ids: Int[Tensor, "responses time"]  # tokens of prompt and response, with padding in place of image patches
    completions: Completions
    records: dict[int, LayerRecord]  # with the response's tokens as queries
    earned: Float[Tensor, " responses"] | None = None  # rewards in environments


@contextmanager
def probing(trainer: L.Trainer) -> Iterator[None]:
    """Run a probe in the trainer's precision, and convert non-finite logits into a one-line StoppedError."""
    with trainer.precision_plugin.forward_context(), stopping_at_non_finite_logits(trainer):
        yield


def is_due(step: int, previous: int, every_n_steps: int) -> bool:
    """Return True if a multiple of `every_n_steps` lies after `previous`, up to and including `step`.

    A batch may take several optimiser steps and pass over the multiple itself.
    """
    return step // every_n_steps > previous // every_n_steps


@torch.no_grad()
def record_answers(
    worker: RolloutWorker,
    example: Example,
    num_generations: int,
    sampling: Sampling,
    layers: Sequence[int],
    generator: torch.Generator | None = None,
    precision: AbstractContextManager | None = None,
) -> Answers:
    """Answer an example's prompt without exploration, and record the attention of `layers`.

    Args:
        worker: policy with its environments and rewards; unchanged by the call.
        example: example of the task.
        num_generations: number of responses to record.
        sampling: sampling parameters.
        layers: layer numbers.
        generator: generator of the random numbers.
        precision: context of the trainer's precision. None: the model's own precision.

    Raises:
        ValueError: a layer cannot be recorded (see AttentionRecorder).
    """
    policy, actions, earned = worker.policy, worker.settled, None
    with evaluating(policy.model), precision or nullcontext():
        if worker.environments is not None:
            acted = act_out(policy, worker.environments, [example], num_generations, sampling, generator, actions)
            prompts, completions = policy.prompt_batch(acted.prompts), acted.completions
            earned = worker.reward([example] * num_generations, completions, acted.environments)[1].total
        else:
            prompts = policy.prompt_batch([policy.data.prompt(example)])
            completions = policy.answer(prompts, num_generations, sampling, generator, actions)
        prompts = prompts.repeat(num_generations)
        with reading(actions, policy.model, "response"), AttentionRecorder(policy.model, layers) as recorder:
            completion_logps(policy.model, prompts, completions, sampling.temperature)
    length = completions.ids.shape[1]
    records = {n: _last_queries(record, length) for n, record in recorder.records.items()}
    return Answers(torch.cat((prompts.input_ids, completions.ids), dim=1), completions, records, earned)


def token_label(text: str) -> str:
    """Return a token's text for an axis, with escapes for characters that are invisible or may lack a glyph."""
    return ascii(text)[1:-1].replace(" ", "·").replace("\\ufffd", "�")


def _last_queries(record: LayerRecord, length: int) -> LayerRecord:
    """Keep only the last tokens' queries, because a map of all queries would grow quadratically with the prompt."""
    if record.attention is None:
        return record
    return replace(record, attention=replace(record.attention, q=record.attention.q[:, :, -length:]))
