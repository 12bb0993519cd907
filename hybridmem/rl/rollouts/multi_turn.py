"""Trajectories of many turns: the policy speaks, an environment answers, and no token is read twice."""

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

    tokens: list[int]  # that the policy reads next
    failed: bool  # whether the turn's calls did
    ended: bool  # whether this was the last turn


class Turns(NamedTuple):
    """Responses in which what an environment said stands between what the policy did.

    `completions.ids` hold both, `completions.mask` names the policy's own tokens: they alone carry loss.
    """

    completions: Completions
    turns: Int[Tensor, " responses"]
    faulty: Bool[Tensor, "responses length"]  # the policy's own tokens of turns whose calls failed


@dataclass
class Row:
    """A trajectory as it grows."""

    waiting: list[int] = field(default_factory=list)  # what the environment said and the policy has not read
    turn: list[int] = field(default_factory=list)  # the policy's tokens since then
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
    """Act `num_generations` times behind each prompt.

    All trajectories take each step together: where one speaks, another reads on in what it was told, so that states
    are never padded nor read again. What all of them are told is read at once.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        prompts: what to begin with.
        num_generations: trajectories from each prompt.
        sampling: how tokens are drawn; max_completion_length counts observations too.
        max_turns: turns of a trajectory; one that needs more counts as truncated.
        respond: (trajectory, tokens of its turn without their end) to what the environment says.
        eos_token_ids: tokens that end a turn.
        pad_token_id: what stands behind the end.
        generator: of the random numbers, or one for each prompt.
        actions: choices of objectives, one row a trajectory.
    """
    logits, cache = prefill(model, prompts, num_generations, actions)
    text = prompts.repeat(num_generations)
    rows = [Row() for _ in range(len(logits))]
    cut = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)  # by the number of turns
    ids, masks, logps, length = [], [], [], 0
    while True:
        drawn, chosen = draw_next(logits, sampling, generator, model, text)
        size = min(_shared(rows), sampling.max_completion_length - length)
        tokens, own = _next(rows, drawn.tolist(), size, pad_token_id)
        ids.append(torch.tensor(tokens, device=logits.device))
        masks.append(torch.tensor(own, device=logits.device)[:, None].expand(-1, size))
        logps.append(torch.zeros(masks[-1].shape, device=logits.device))
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
        with reading(actions, model, "response"):
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
    """How many tokens all trajectories that go on can read at once; 1 where one of them speaks."""
    return max(1, min((len(row.waiting) for row in rows if not row.finished), default=1))


def _next(rows: list[Row], drawn: list[int], size: int, pad_id: int) -> tuple[list[list[int]], list[bool]]:
    """The next tokens of every trajectory, and whether they are its own."""
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
    """Take a token that was drawn; at its end the turn is made."""
    if token not in ends:
        row.turn.append(token)
        return
    reply = respond(number, row.turn)
    row.turns += 1
    if reply.failed:
        row.faulty.append(range(length - len(row.turn) - 1, length))
    row.turn, row.waiting, row.finished = [], list(reply.tokens), reply.ended
