"""Reward functions, sync and async, their weighted sum, and errors for faulty functions."""

import asyncio
import math
import pickle
import threading
from functools import partial

import pytest
import torch

from hybridmem.rl import FormatReward, OverlongPenalty, RewardSum, check_columns

PROMPTS = ["1+1=", "2+2=", "say hi"]
COMPLETIONS = ["2", "5", "hi"]
IDS = [[50], [53], [104, 105]]
ANSWERS = ["2", "4", None]


def accuracy(prompts, completions, completion_ids, answer, **kwargs):
    return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]


async def length(completion_ids, **kwargs):
    await asyncio.sleep(0)
    return [len(ids) for ids in completion_ids]


class Constant:
    def __init__(self, value):
        self.value = value

    async def __call__(self, prompts, **kwargs):
        return [self.value] * len(prompts)


def score(*functions, weights=None, **columns):
    return RewardSum(functions, weights)(PROMPTS, COMPLETIONS, IDS, **columns)


def test_the_weighted_sum_skips_functions_that_do_not_apply():
    rewards = score(accuracy, length, weights=[2.0, -0.5], answer=ANSWERS)
    torch.testing.assert_close(
        rewards.per_function, torch.tensor([[1.0, 1.0], [0.0, 1.0], [math.nan, 2.0]]), equal_nan=True
    )
    assert rewards.total.tolist() == [2 - 0.5, 0 - 0.5, -0.5 * 2]


def test_metrics_have_trl_names():
    summed = RewardSum([accuracy, length])
    metrics = summed.metrics(summed(PROMPTS, COMPLETIONS, IDS, answer=ANSWERS))
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "reward": (2 + 1 + 2) / 3,
            "reward_std": (1 / 3) ** 0.5,  # (2 · (1/3)² + (2/3)²) / 2
            "rewards/accuracy/mean": 1 / 2,  # of the two samples to which it applies
            "rewards/accuracy/std": 0.5**0.5,  # (2 · (1/2)²) / 1
            "rewards/length/mean": 4 / 3,
            "rewards/length/std": (1 / 3) ** 0.5,
        }
    )


def test_metrics_omit_functions_without_samples():
    summed = RewardSum([accuracy, length])
    metrics = summed.metrics(summed(PROMPTS[2:], COMPLETIONS[2:], IDS[2:], answer=[None]))
    assert {name: value.item() for name, value in metrics.items()} == {"reward": 2.0, "rewards/length/mean": 2.0}


def test_async_functions_run_side_by_side():
    """Each function waits for the other, so sequential calls would deadlock."""
    met = threading.Barrier(2, timeout=5)

    async def first(prompts, **kwargs):
        await asyncio.to_thread(met.wait)
        return [1.0] * len(prompts)

    async def second(prompts, **kwargs):
        await asyncio.to_thread(met.wait)
        return [2.0] * len(prompts)

    assert score(first, second).per_function.tolist() == [[1.0, 2.0]] * 3


def test_functions_keep_their_columns_whichever_is_async():
    rewards = score(length, partial(Constant(7.0)), OverlongPenalty(2, 1), Constant(9.0).__call__)
    assert rewards.per_function.tolist() == [[1, 7, 0, 9], [1, 7, 0, 9], [2, 7, -1, 9]]


def test_works_where_a_loop_is_running():
    """This is the situation in a notebook."""

    async def main():
        return score(length)

    assert asyncio.run(main()).total.tolist() == [1, 1, 2]


def test_clients_keep_their_loop():
    loops = []

    async def remembers(prompts, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(prompts)

    score(remembers)
    score(remembers)
    assert loops[0] is loops[1]


def test_ordinary_functions_run_in_the_callers_thread():
    threads = []

    def timed(prompts, **kwargs):
        threads.append(threading.current_thread())
        return [0.0] * len(prompts)

    score(timed, length)
    assert threads == [threading.current_thread()]


def fails(**kwargs):
    raise KeyError("answer")


async def fails_later(**kwargs):
    raise KeyError("answer")


def gives_text(**kwargs):
    return ["good"] * 3


def gives_one(**kwargs):
    return 1.0


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (fails, "KeyError: 'answer'"),
        (fails_later, "KeyError: 'answer'"),
        (gives_text, "ValueError: could not convert string to float"),
        (gives_one, "TypeError: 'float' object is not iterable"),
    ],
)
def test_a_function_that_fails_is_named(function, problem):
    message = rf"reward function '{function.__name__}' failed on the batch with the first prompt '1\+1=': "
    with pytest.raises(RuntimeError, match=message + problem) as raised:
        score(length, function)
    assert type(raised.value.__cause__).__name__ == problem.split(":")[0]


def test_long_prompts_are_shortened():
    with pytest.raises(RuntimeError, match=r"'a{199}…: KeyError"):
        RewardSum([fails])(["a" * 10_000], ["b"], [[1]])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, torch.tensor(-math.inf), 1e300, -1e19])
def test_rewards_must_be_finite(wrong):
    def odd(prompts, **kwargs):
        return [0.0, wrong, None]

    with pytest.raises(ValueError, match=r"'odd' returned (nan|-?inf|1e\+300|-1e\+19) for the prompt '2\+2='"):
        score(odd, length)


def test_one_reward_for_each_sample():
    def short(**kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="reward function 'short' returned 1 rewards for 3 samples"):
        score(short)


def test_a_sample_that_no_function_applies_to():
    with pytest.raises(ValueError, match="no reward for the prompt 'say hi', because accuracy all returned None"):
        score(accuracy, answer=ANSWERS)
    with pytest.raises(
        ValueError, match=r"return a number such as 0 from one of them, or add a function to reward_funcs"
    ):
        score(accuracy, lambda prompts, **_: [None] * len(prompts), answer=ANSWERS)


@pytest.mark.parametrize(
    ("functions", "weights", "message"),
    [
        ([], None, "reward_funcs is empty"),
        ([accuracy, accuracy], None, "contains a name twice .accuracy, accuracy."),
        ([accuracy], [1.0, 2.0], r"reward_weights has 2 weights for 1 reward functions \(accuracy\)"),
        ([accuracy], [math.nan], r"reward_weights=\[nan\] must be finite"),
    ],
)
def test_a_sum_that_cannot_work(functions, weights, message):
    with pytest.raises(ValueError, match=message):
        RewardSum(functions, weights)


def test_columns_are_checked_before_training():
    RewardSum([accuracy, length, Constant(1.0), OverlongPenalty(8, 2)]).check_columns(["prompt", "answer", "level"])
    with pytest.raises(
        ValueError, match=r"'accuracy' does not match the dataset: missing a required argument: 'answer'"
    ):
        RewardSum([length, accuracy]).check_columns(["prompt", "question"])
    check_columns(partial(accuracy, answer=["4"]), ["prompt"])


def test_functions_must_take_every_column():
    """TRL also passes all columns."""

    def strict(prompts, completions, completion_ids, answer):
        return [0.0] * len(prompts)

    check_columns(strict, ["prompt", "completion", "completion_ids", "answer"])
    with pytest.raises(ValueError, match=r"an unexpected keyword argument 'level'. .* or \*\*kwargs to the function"):
        check_columns(strict, ["prompt", "answer", "level"])


def test_overlong_penalty():
    """With max_completion_length 10 and cache_length 4, the reward is 0 to 6 tokens, −1/4 at 7 and −1 from 10 on."""
    penalty = OverlongPenalty(max_completion_length=10, cache_length=4)
    lengths = [0, 6, 7, 8, 10, 12]
    assert penalty(completion_ids=[[0] * n for n in lengths]) == [0, 0, -0.25, -0.5, -1, -1]
    assert pickle.loads(pickle.dumps(penalty)) == penalty


@pytest.mark.parametrize("cache_length", [0, 11])
def test_the_cache_is_part_of_the_completion(cache_length):
    with pytest.raises(ValueError, match=f"cache_length={cache_length} must be between 1 and max_completion_length=10"):
        OverlongPenalty(10, cache_length)


def test_format_reward():
    think = FormatReward(r"<think>.*</think><answer>.*</answer>")
    good = "<think>1\n2</think><answer>3</answer>"
    messages = [{"role": "assistant", "content": "well"}, {"role": "assistant", "content": good}]
    assert think(completions=[good, good + "!", "<think></think>", messages]) == [1, 0, 0, 1]
    with pytest.raises(ValueError, match=r"pattern='\(' is not a valid regular expression"):
        FormatReward("(")
