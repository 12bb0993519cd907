"""Multi-turn sampling, compared with a single forward pass over the trajectory."""

import pytest
import torch

from hybridmem.rl.rollouts.multi_turn import Reply, sample_turns
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.sampling import Sampling
from hybridmem.rl.rollouts.scoring import completion_logps

from .test_sampling import PROMPTS, model_of

ENDS, PAD, TIMES = [7, 11], 0, 3


def answer(number, turn):
    """Return a different reply for every trajectory and turn, sometimes empty, final or a failure."""
    seed = 31 * number + sum(turn) + len(turn)
    return Reply([(seed + n) % 37 for n in range(seed % 5)], failed=seed % 3 == 0, ended=seed % 7 == 0)


def act(model, respond=answer, max_turns=4, length=30, prompts=PROMPTS):
    batch = pad_prompts(prompts, PAD, torch.device("cpu"))
    sampling = Sampling(max_completion_length=length, temperature=0.8)
    generator = torch.Generator().manual_seed(0)
    return batch.repeat(TIMES), sample_turns(model, batch, TIMES, sampling, max_turns, respond, ENDS, PAD, generator)


@pytest.mark.parametrize("kind", ["llama", "mag", "mac", "mal", "lmm", "swa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_the_training_path_gives_the_samplers_log_probabilities(kind, dtype, tolerance):
    model = model_of(kind).to(dtype)
    prompts, found = act(model)
    logps, _ = completion_logps(model, prompts, found.completions, 0.8)
    mask = found.completions.mask
    torch.testing.assert_close(logps[mask], found.completions.sampled_logps[mask], rtol=0, atol=tolerance)
    assert not found.completions.sampled_logps[~mask].any()
    assert 1 < found.turns.max() <= 4


def test_turns_and_observations_stand_in_the_order_that_they_came():
    heard = {}

    def respond(number, turn):
        reply = answer(number, turn)
        heard.setdefault(number, []).append((turn, reply))
        return reply

    _, found = act(model_of("mag"), respond)
    completions = found.completions
    for number, turns in heard.items():
        assert int(found.turns[number]) == len(turns)
        place = 0
        for turn, reply in turns:
            said = completions.ids[number, place : place + len(turn) + 1].tolist()
            assert said[:-1] == turn
            assert said[-1] in ENDS
            own = slice(place, place + len(turn) + 1)
            assert completions.mask[number, own].all()
            assert (found.faulty[number, own] == reply.failed).all()
            place += len(turn) + 1
            if reply.ended or (turn, reply) == turns[-1]:
                break
            assert completions.ids[number, place : place + len(reply.tokens)].tolist() == reply.tokens
            assert not completions.mask[number, place : place + len(reply.tokens)].any()
            place += len(reply.tokens)


def test_trajectories_beyond_the_limits_are_truncated():
    never = lambda number, turn: Reply([], failed=False, ended=False)  # noqa: E731
    _, found = act(model_of("mag"), never, max_turns=1, length=200)
    assert found.completions.truncated.all()
    assert (found.turns == 1).all()
    _, found = act(model_of("mag"), never, max_turns=100, length=5)
    assert found.completions.truncated.all()
    assert found.completions.ids.shape[1] == 5
    at_once = lambda number, turn: Reply([1, 2], failed=False, ended=True)  # noqa: E731
    _, found = act(model_of("mag"), at_once, length=200)
    assert not found.completions.truncated.any()
    assert found.completions.mask.sum(1).max() == found.completions.ids.shape[1]  # the last observation is not read


def test_common_observation_tokens_are_read_in_one_call():
    model, calls = model_of("mag"), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    turn = lambda number, turn: Reply([5] * 20, failed=False, ended=False)  # noqa: E731
    _, found = act(model, turn, max_turns=3, length=400, prompts=PROMPTS[:1])
    assert len(calls) < found.completions.ids.shape[1]
