"""Reward functions with TRL's signature, and their weighted sum.

A reward function takes keyword arguments and scores a batch of samples in one call. It returns a number per sample, or
None where it does not apply. The dataset's other columns are passed as lists with one value per sample:

    def accuracy(prompts, completions, completion_ids, answer, **kwargs):
        return [float(completion == right) for completion, right in zip(completions, answer)]

The function may be `async`. A completion is text, or a list of messages if the prompt is one.
"""

import asyncio
import inspect
import math
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from threading import Thread
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

RewardFunction = Callable[..., Any]  # returns list[float | None], or a coroutine of one
Completion = str | list[dict[str, Any]]

PASSED = ("prompts", "completions", "completion_ids")
NOT_PASSED = ("prompt", "completion")  # columns that PASSED already covers
SHOWN = 200  # characters of a prompt in an error message
LARGEST = 1e18  # reward; the squares of larger ones overflow in float32


class Rewards(NamedTuple):
    """Rewards of samples: the weighted sum, and the unweighted reward of each function (NaN if not applicable)."""

    total: Float[Tensor, " responses"]
    per_function: Float[Tensor, "responses functions"]


class RewardSum:
    """Weighted sum of reward functions; a function that does not apply to a sample adds nothing.

    Args:
        reward_funcs: functions with TRL's signature.
        reward_weights: one weight per function; None gives each function weight 1.

    Raises:
        ValueError: There are no functions, two functions share a name, or the weights are not one finite number each.
    """

    def __init__(self, reward_funcs: Sequence[RewardFunction], reward_weights: Sequence[float] | None = None):
        self.reward_funcs = list(reward_funcs)
        self.reward_weights = [1.0] * len(self.reward_funcs) if reward_weights is None else list(reward_weights)
        self.names = [reward_name(function) for function in self.reward_funcs]
        if not self.reward_funcs:
            raise ValueError("reward_funcs is empty; add a reward function, such as the task's reward")
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"reward_funcs contains a name twice ({', '.join(self.names)}), but metrics are logged by name; set a "
                "different __name__"
            )
        if len(self.reward_weights) != len(self.names):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} weights for {len(self.names)} reward functions "
                f"({', '.join(self.names)}); set one weight per function"
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights={self.reward_weights} must be finite")

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check every function against a dataset's columns (see the function `check_columns`)."""
        columns = list(columns)
        for function in self.reward_funcs:
            check_columns(function, columns)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> Rewards:
        """Return the rewards of samples in float32 on the CPU; `async` functions run concurrently after the others.

        Raises:
            RuntimeError: A function raised an error; the message contains the function, the first prompt and the error.
            ValueError: A function returned a wrong number of rewards or a non-finite one, or a sample has no reward.
        """
        inputs = dict(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        outputs = _call_all(self.reward_funcs, inputs)
        for name, output in zip(self.names, outputs, strict=True):
            _check_output(name, output, prompts)
        rows = [[math.nan if reward is None else reward for reward in output] for output in outputs]
        per_function = torch.tensor(rows, dtype=torch.float32).T
        unscored = per_function.isnan().all(1)
        if unscored.any():
            prompt = prompts[int(unscored.nonzero()[0])]
            raise ValueError(
                f"no reward for the prompt {_shown(prompt)}, because {', '.join(self.names)} all returned None; return "
                "a number such as 0 from one of them, or add a function to reward_funcs that always applies"
            )
        total = torch.zeros(len(per_function))
        for weight, column in zip(self.reward_weights, per_function.T, strict=True):
            # Column by column: `sum(1)` adds some rows in another order, and sums of equal rewards would differ.
            total = total + column.nan_to_num(0.0) * weight
        return Rewards(total, per_function)

    def metrics(self, rewards: Rewards) -> dict[str, Float[Tensor, ""]]:
        """Return means and standard deviations under TRL's names, and `rewards/NAME/failures`.

        Means need at least one sample and standard deviations at least two; otherwise they are omitted. Failures are
        reported for functions with an attribute `failures`.
        """
        means_and_stds = _mean_and_std("reward", "reward_std", rewards.total)
        for function, name, column in zip(self.reward_funcs, self.names, rewards.per_function.T, strict=True):
            if hasattr(function, "failures"):
                means_and_stds[f"rewards/{name}/failures"] = torch.tensor(float(function.failures))
            means_and_stds |= _mean_and_std(f"rewards/{name}/mean", f"rewards/{name}/std", column[~column.isnan()])
        return means_and_stds


def check_columns(function: RewardFunction, columns: Iterable[str]) -> None:
    """Check that a reward function accepts the columns of a dataset.

    Raises:
        ValueError: The function requires a missing column, or accepts an existing one neither by name nor by **kwargs.
    """
    extra = [column for column in columns if column not in (*PASSED, *NOT_PASSED)]
    try:
        inspect.signature(function).bind(**dict.fromkeys((*PASSED, *extra)))
    except TypeError as error:
        raise ValueError(
            f"reward function {reward_name(function)!r} does not match the dataset: {error}. It is called with "
            f"{', '.join((*PASSED, *extra))}; add the column to the dataset, or **kwargs to the function"
        ) from error


def reward_name(function: RewardFunction) -> str:
    """Return the name of a reward function in the log: its own name, or its class's."""
    function = _unwrapped(function)
    return getattr(function, "__name__", type(function).__name__)


@dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), a reward in [−1, 0].

    The reward is 0 up to max_completion_length − cache_length tokens, and falls linearly to −1 at
    max_completion_length.

    Args:
        max_completion_length: the maximum number of tokens in a response.
        cache_length: the length in tokens of the interval over which the reward falls.

    Raises:
        ValueError: cache_length is not between 1 and max_completion_length.
    """

    max_completion_length: int
    cache_length: int

    def __post_init__(self) -> None:
        if not 1 <= self.cache_length <= self.max_completion_length:
            raise ValueError(
                f"cache_length={self.cache_length} must be between 1 and max_completion_length="
                f"{self.max_completion_length} tokens"
            )

    def __call__(self, completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        """Return the reward of each completion by its length in tokens."""
        start = self.max_completion_length - self.cache_length
        return [max(min((start - len(ids)) / self.cache_length, 0.0), -1.0) for ids in completion_ids]


@dataclass(frozen=True)
class FormatReward:
    """Reward of 1 for completions that fully match a regular expression, and of 0 for others.

    Args:
        pattern: the regular expression; `.` also matches newlines.

    Raises:
        ValueError: The pattern is not a valid regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r} is not a valid regular expression: {error}") from error

    def __call__(self, completions: Sequence[Completion], **kwargs: Any) -> list[float]:
        """Return the reward of each completion, or of its last message."""
        texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
        return [float(re.fullmatch(self.pattern, text, re.DOTALL) is not None) for text in texts]


def _call_all(functions: Sequence[RewardFunction], inputs: dict[str, Any]) -> list[list[float | None]]:
    # Synchronous functions run in the caller's thread, where time limits by signal work.
    outputs = {number: _call(f, inputs) for number, f in enumerate(functions) if not _is_async(f)}
    waiting = {number: f for number, f in enumerate(functions) if number not in outputs}
    if waiting:
        together = _gather([_await(function, inputs) for function in waiting.values()])
        awaited = asyncio.run_coroutine_threadsafe(together, _event_loop()).result()
        outputs |= dict(zip(waiting, awaited, strict=True))
    return [outputs[number] for number in range(len(functions))]


def _call(function: RewardFunction, inputs: dict[str, Any]) -> list[float | None]:
    with _named_errors(function, inputs["prompts"]):
        return _floats(function(**inputs))


async def _await(function: RewardFunction, inputs: dict[str, Any]) -> list[float | None]:
    with _named_errors(function, inputs["prompts"]):
        return _floats(await function(**inputs))


async def _gather(coroutines: Sequence[Coroutine[Any, Any, list[float | None]]]) -> list[list[float | None]]:
    return await asyncio.gather(*coroutines)


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop in its own thread; clients keep connections to it, and a notebook's loop is busy."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


@contextmanager
def _named_errors(function: RewardFunction, prompts: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"reward function {reward_name(function)!r} failed on the batch with the first prompt "
            f"{_shown(prompts[0])}: {type(error).__name__}: {error}"
        ) from error


def _check_output(name: str, output: list[float | None], prompts: Sequence[Any]) -> None:
    if len(output) != len(prompts):
        raise ValueError(
            f"reward function {name!r} returned {len(output)} rewards for {len(prompts)} samples; it must return one "
            "per sample"
        )
    for reward, prompt in zip(output, prompts, strict=True):
        if reward is not None and not abs(reward) <= LARGEST:
            raise ValueError(
                f"reward function {name!r} returned {reward} for the prompt {_shown(prompt)}; it must return a finite "
                f"number of at most {LARGEST:g}, or None if it does not apply"
            )


def _floats(output: Any) -> list[float | None]:
    return [None if reward is None else float(reward) for reward in output]


def _mean_and_std(mean_name: str, std_name: str, values: Float[Tensor, " values"]) -> dict[str, Float[Tensor, ""]]:
    mean = {mean_name: values.mean()} if len(values) else {}
    return mean | ({std_name: values.std()} if len(values) > 1 else {})


def _is_async(function: RewardFunction) -> bool:
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _unwrapped(function: RewardFunction) -> RewardFunction:
    while isinstance(function, partial):
        function = function.func
    return function


def _shown(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
