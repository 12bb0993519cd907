"""Sampling of multi-turn trajectories with a KV cache that processes every token once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hybridmem.rl.attention.action import Action, reading

from .completions import Completions
from .prompts import PromptBatch
from .random_streams import Generators
from .sampling import Sampling, draw_next, prefill, read


class Reply(NamedTuple):
    """An environment's answer to a turn."""

    tokens: list[int]  # the observation, which the policy reads next
    failed: bool  # True if a call of the turn failed
    ended: bool  # True if the turn was the last one


class Turns(NamedTuple):
    """Trajectories in which the policy's turns and the environment's observations alternate.

    `completions.ids` contains both; `completions.mask` marks the policy's own tokens, which alone carry loss.
    """

    completions: Completions
    turns: Int[Tensor, " responses"]
    faulty: Bool[Tensor, "responses length"]  # the policy's own tokens of turns whose calls failed


@dataclass
class Row:
    """State of a growing trajectory."""

    waiting: list[int] = field(default_factory=list)  # observation tokens that the policy has yet to read
    turn: list[int] = field(default_factory=list)  # the policy's tokens in the current turn
    turns: int = 0
    finished: bool = False
    faulty: list[range] = field(default_factory=list)


@torch.no_grad()
def sample_turns(
    model: Any,
    prompts: PromptBatch,
    num_generations: int,
    sampling: Sampling,
    max_turns: int,
    respond: Callable[[int, list[int]], Reply],
    eos_token_ids: list[int],
    pad_token_id: int,
    generator: Generators = None,
    actions: Sequence[Action] = (),
) -> Turns:
    """Sample `num_generations` multi-turn trajectories from each prompt.

    All trajectories advance in lockstep: while one generates a token, another reads the next token of its observation.
    The cache therefore needs no padding and no second prefill. Observation tokens that are pending in all unfinished
    trajectories are read in one call.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        prompts: the first prompt of each trajectory.
        num_generations: the number of trajectories per prompt.
        sampling: the sampling settings; max_completion_length includes observations.
        max_turns: the maximum number of turns; a trajectory that needs more counts as truncated.
        respond: maps (trajectory index, tokens of its turn without EOS) to the environment's reply.
        eos_token_ids: tokens that end a turn.
        pad_token_id: the token that fills finished rows.
        generator: a random generator, or one per prompt.
        actions: choices of objectives, with one row per trajectory.
    """
    logits, cache = prefill(model, prompts, num_generations, actions)
    text = prompts.repeat(num_generations)
    rows = [Row() for _ in range(len(logits))]
    cut = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)  # True at max_turns
    ids, masks, logps, length = [], [], [], 0
    with reading(actions, model, "response"):
        while True:
            drawn, chosen = draw_next(logits, sampling, generator, model, text)
            size = min(_shared(rows), sampling.max_completion_length - length)
            tokens, own = _next(rows, drawn.tolist(), size, pad_token_id)
            ids.append(torch.tensor(tokens, device=logits.device))
            masks.append(torch.tensor(own, device=logits.device)[:, None].expand(-1, size))
            logps.append(chosen.new_zeros(masks[-1].shape))
            logps[-1][:, 0] = chosen.where(masks[-1][:, 0], 0)
            length += size
            for number, (row, speaks) in enumerate(zip(rows, own, strict=True)):
                if speaks:
                    _speak(row, number, tokens[number][0], length, respond, eos_token_ids)
                    if row.turns == max_turns and not row.finished:
                        row.finished = cut[number] = True
            if length == sampling.max_completion_length or all(row.finished for row in rows):
                break
            text = text.followed_by(ids[-1])
            logits = read(model, text.last(size), cache)[:, -1]
    unfinished = torch.tensor([not row.finished for row in rows], device=logits.device)
    completions = Completions(torch.cat(ids, 1), torch.cat(masks, 1), unfinished | cut, torch.cat(logps, 1))
    faulty = torch.zeros_like(completions.mask)
    for number, row in enumerate(rows):
        for where in row.faulty:
            faulty[number, where.start : where.stop] = True
    turns = torch.tensor([row.turns for row in rows], device=logits.device)
    return Turns(completions, turns, faulty & completions.mask)


def _shared(rows: list[Row]) -> int:
    """Return how many tokens all unfinished trajectories can read at once; 1 if one of them generates."""
    return max(1, min((len(row.waiting) for row in rows if not row.finished), default=1))


def _next(rows: list[Row], drawn: list[int], size: int, pad_id: int) -> tuple[list[list[int]], list[bool]]:
    """Return the next tokens of every trajectory, and a flag for tokens that the policy generated."""
    tokens, own = [], []
    for row, token in zip(rows, drawn, strict=True):
        speaks = not row.finished and not row.waiting
        own.append(speaks)
        if row.finished:
            tokens.append([pad_id] * size)
        elif speaks:
            tokens.append([token])
        else:
            tokens.append(row.waiting[:size])
            row.waiting = row.waiting[size:]
    return tokens, own


def _speak(
    row: Row, number: int, token: int, length: int, respond: Callable[[int, list[int]], Reply], ends: list[int]
) -> None:
    """Append a generated token to the turn, or get the environment's reply if the token is EOS."""
    if token not in ends:
        row.turn.append(token)
        return
    reply = respond(number, row.turn)
    row.turns += 1
    if reply.failed:
        row.faulty.append(range(length - len(row.turn) - 1, length))
    row.turn, row.waiting, row.finished = [], list(reply.tokens), reply.ended
