"""Reward functions with TRL's signature, and their weighted sum.

A reward function is called with keywords, once for many samples. It gives each a number, or None where it does not
apply. The dataset's other columns come as lists of a value for each sample:

    def accuracy(prompts, completions, completion_ids, answer, **kwargs):
        return [float(completion == right) for completion, right in zip(completions, answer)]

It may be `async`. A completion is text, or a list of messages where the prompt is one.
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

RewardFunction = Callable[..., Any]  # gives list[float | None], or a coroutine of one
Completion = str | list[dict[str, Any]]

PASSED = ("prompts", "completions", "completion_ids")
NOT_PASSED = ("prompt", "completion")  # columns that PASSED holds already
SHOWN = 200  # characters of a prompt in an error


class Rewards(NamedTuple):
    """What samples got: the weighted sum, and each function's reward, unweighted, NaN where it does not apply."""

    total: Float[Tensor, " responses"]
    per_function: Float[Tensor, "responses functions"]


class RewardSum:
    """The weighted sum of reward functions; a function that does not apply to a sample adds nothing.

    Args:
        reward_funcs: functions with TRL's signature.
        reward_weights: a weight for each; None is 1 for all.

    Raises:
        ValueError: no functions, two of one name, or weights that are not a finite number for each.
    """

    def __init__(self, reward_funcs: Sequence[RewardFunction], reward_weights: Sequence[float] | None = None):
        self.reward_funcs = list(reward_funcs)
        self.reward_weights = [1.0] * len(self.reward_funcs) if reward_weights is None else list(reward_weights)
        self.names = [reward_name(function) for function in self.reward_funcs]
        if not self.reward_funcs:
            raise ValueError("reward_funcs is empty: without a reward function no response is better than another")
        if len(set(self.names)) < len(self.names):
            raise ValueError(
                f"reward_funcs: two of {', '.join(self.names)} have one name and would be logged as one; "
                "set the __name__ of one"
            )
        if len(self.reward_weights) != len(self.names):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} weights for {len(self.names)} reward functions "
                f"({', '.join(self.names)}); give one for each"
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise ValueError(f"reward_weights={self.reward_weights} must be finite")

    def check_columns(self, columns: Iterable[str]) -> None:
        """`check_columns` of every function."""
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
        """Reward samples, in float32 on the CPU; `async` functions run side by side, after the others.

        Raises:
            RuntimeError: a function failed; the message names it, the first prompt and what it raised.
            ValueError: a function gave a wrong number of rewards or one that is not finite, or a sample has no reward.
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
                f"no reward for the prompt {_shown(prompt)}: {', '.join(self.names)} all gave None; let one of them "
                "give a number where no other applies, such as 0, or add one to reward_funcs that always does"
            )
        return Rewards((per_function * torch.tensor(self.reward_weights)).nansum(1), per_function)

    def metrics(self, rewards: Rewards) -> dict[str, Float[Tensor, ""]]:
        """Means and deviations under TRL's names; what no sample, or for a deviation only one, has is left out.

        Beside them `rewards/NAME/failures`, of functions that count in `failures` how often they could not tell.
        """
        means_and_stds = _mean_and_std("reward", "reward_std", rewards.total)
        for function, name, column in zip(self.reward_funcs, self.names, rewards.per_function.T, strict=True):
            if hasattr(function, "failures"):
                means_and_stds[f"rewards/{name}/failures"] = torch.tensor(float(function.failures))
            means_and_stds |= _mean_and_std(f"rewards/{name}/mean", f"rewards/{name}/std", column[~column.isnan()])
        return means_and_stds


def check_columns(function: RewardFunction, columns: Iterable[str]) -> None:
    """Check that a reward function can be called with the columns of a dataset.

    Raises:
        ValueError: it needs a column that is not there, or takes one of them neither by name nor as **kwargs.
    """
    extra = [column for column in columns if column not in (*PASSED, *NOT_PASSED)]
    try:
        inspect.signature(function).bind(**dict.fromkeys((*PASSED, *extra)))
    except TypeError as error:
        raise ValueError(
            f"reward function {reward_name(function)!r} does not fit the dataset: {error}. It is called with "
            f"{', '.join((*PASSED, *extra))}; give the dataset the column, or the function **kwargs"
        ) from error


def reward_name(function: RewardFunction) -> str:
    """The name that a reward function is logged under: its own, or its class's."""
    function = _unwrapped(function)
    return getattr(function, "__name__", type(function).__name__)


@dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), a reward in [−1, 0].

    0 up to max_completion_length − cache_length tokens, then falling evenly, −1 at max_completion_length and beyond.

    Args:
        max_completion_length: the most tokens that a response can have.
        cache_length: how many tokens before that the punishment begins.

    Raises:
        ValueError: a cache that is not between 1 and max_completion_length tokens.
    """

    max_completion_length: int
    cache_length: int

    def __post_init__(self) -> None:
        if not 1 <= self.cache_length <= self.max_completion_length:
            raise ValueError(
                f"cache_length={self.cache_length} must be from 1 to max_completion_length="
                f"{self.max_completion_length} tokens"
            )

    def __call__(self, completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
        """The punishment of each completion, by its length in tokens."""
        start = self.max_completion_length - self.cache_length
        return [max(min((start - len(ids)) / self.cache_length, 0.0), -1.0) for ids in completion_ids]


@dataclass(frozen=True)
class FormatReward:
    """1 for a completion that is, as a whole, what a regular expression describes, else 0; `.` matches line ends too.

    Args:
        pattern: the regular expression.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern={self.pattern!r} is no regular expression: {error}") from error

    def __call__(self, completions: Sequence[Completion], **kwargs: Any) -> list[float]:
        """The reward of each completion; of messages, the last one counts."""
        texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
        return [float(re.fullmatch(self.pattern, text, re.DOTALL) is not None) for text in texts]


def _call_all(functions: Sequence[RewardFunction], inputs: dict[str, Any]) -> list[list[float | None]]:
    # Ordinary functions stay in the caller's thread: time limits by signal work nowhere else.
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
    """A loop that lives on in a thread of its own: clients keep connections to it, and a notebook's loop is in use."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


@contextmanager
def _named_errors(function: RewardFunction, prompts: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"reward function {reward_name(function)!r} failed on the samples that begin with the prompt "
            f"{_shown(prompts[0])}: {type(error).__name__}: {error}"
        ) from error


def _check_output(name: str, output: list[float | None], prompts: Sequence[Any]) -> None:
    if len(output) != len(prompts):
        raise ValueError(
            f"reward function {name!r} gave {len(output)} rewards for {len(prompts)} samples; it must give one for each"
        )
    for reward, prompt in zip(output, prompts, strict=True):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(
                f"reward function {name!r} gave {reward} for the prompt {_shown(prompt)}; a reward is a finite number, "
                "or None where the function does not apply"
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
