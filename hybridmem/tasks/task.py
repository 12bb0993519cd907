"""The interface of tasks with verifiable answers, its checks, and shared helpers."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
END_OF_ANSWER = 1  # the token that ends a completion


@runtime_checkable
class Task(Protocol):
    """Prompts with verifiable answers; the constructor's arguments are the task's settings."""

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return an example {"prompt", "answer", further columns} that depends on seed, split and index only."""
        ...

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return each completion's reward in [0, 1]; TRL's signature, with the examples' columns as lists."""
        ...

    @property
    def max_completion_length(self) -> int:
        """Return the number of tokens in the longest answer, EOS included, with one token per byte."""
        ...


@runtime_checkable
class MeasuredTask(Task, Protocol):
    """A task whose prompts have a length in tokens, so that it has to know the tokenizer."""

    def measure_with(self, count: Callable[[str], int]) -> None:
        """Take the function that counts the tokens of a prompt's text."""
        ...


# Signature and return value of each method.
METHODS = {
    "example": ("example(split, index)", "a dict with the texts 'prompt' and 'answer'"),
    "reward": ("reward(prompts, completions, answer, **columns)", "a list with a float in [0, 1] for each completion"),
}
LENGTH = "max_completion_length"
LENGTH_RETURNS = "a positive int, the number of tokens in the longest answer"


def check_task(task: Any) -> None:
    """Check that an object implements Task.

    Raises:
        ValueError: A member is missing or has the wrong type; the message contains the class, the member and its
            required return value.
    """
    flaw = flaw_of_methods(task)
    if flaw:
        raise ValueError(flaw)
    name = class_name(type(task))
    if not hasattr(task, LENGTH):
        raise ValueError(f"{name} is not a task: it lacks the property {LENGTH}, which must return {LENGTH_RETURNS}")
    length = getattr(task, LENGTH)
    if callable(length):
        raise ValueError(f"{name} is not a task: its {LENGTH} is a method; make it a property, {LENGTH_RETURNS}")
    if not isinstance(length, int | np.integer) or length < 1:
        raise ValueError(f"{name} is not a task: its {LENGTH} is {length!r}; it must return {LENGTH_RETURNS}")


def check_example(task: Task, example: Any, with_answer: bool) -> None:
    """Check that a task's example is a dict with a prompt as text, and an answer as text unless it has turns.

    Raises:
        ValueError: The example is invalid; the message contains the task's class and the column.
    """
    call, returns = METHODS["example"]
    name = f"{class_name(type(task))}.{call}"
    if not isinstance(example, dict):
        raise ValueError(f"{name} returned {type(example).__name__}; it must return {returns}")
    for column in ("prompt", "answer") if with_answer and "turns" not in example else ("prompt",):
        if not isinstance(example.get(column), str):
            has = type(example[column]).__name__ if column in example else "nothing"
            raise ValueError(f"{name} returned {has} as {column!r}; it must return {returns}")


def flaw_of_methods(task: Any) -> str:
    """Return an error message for the first invalid method of a class or object, or an empty string."""
    name = class_name(task if isinstance(task, type) else type(task))
    for method, (call, returns) in METHODS.items():
        member = getattr(task, method, None)
        if member is None:
            return f"{name} is not a task: it lacks the method {call}, which must return {returns}"
        if not callable(member):
            kind = type(member).__name__
            return f"{name} is not a task: its {method} has type {kind}; {call} must be a method that returns {returns}"
    return ""


def flaw_of_class(task: Any) -> str:
    """Return an error message for a class that the command line rejects as a task.

    The command line also requires the methods' annotations to equal Task's.
    """
    if not isinstance(task, type):
        return f"{task!r} is not a class; set the class of a task"
    flaw = flaw_of_methods(task)
    if flaw:
        return flaw
    other = [f"def {name}{ours}" for name in METHODS if (ours := _signature(Task, name)) != _signature(task, name)]
    return f"{class_name(task)} has other annotations than hybridmem.tasks.Task; declare {' and '.join(other)}"


def class_name(kind: type) -> str:
    """Return a class's name, qualified by its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _signature(kind: type, method: str) -> str:
    return str(inspect.signature(getattr(kind, method))).replace("typing.", "")


def example_generator(seed: int, split: Split, index: int) -> np.random.Generator:
    """Return the random generator of an example, independent for each seed, split and index.

    Raises:
        ValueError: The split is unknown, or the index is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    if index < 0:
        raise ValueError(f"index={index} must be at least 0")
    return np.random.default_rng((seed, SPLITS.index(split), index))


def exact_match(completions: list[str], answer: list[str]) -> list[float]:
    """Return 1 for completions that equal the answer, up to trailing white space, and 0 for others.

    A completion is the generated text up to EOS.
    """
    return [float(completion.rstrip() == right) for completion, right in zip(completions, answer, strict=True)]
