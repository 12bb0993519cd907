"""What a task with a checkable answer offers, and what all of them share."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
END_OF_ANSWER = 1  # the token that ends a completion


@runtime_checkable
class Task(Protocol):
    """Prompts with answers that can be checked. The constructor's arguments are the task's settings."""

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """An example as {"prompt", "answer", further columns}; it follows from seed, split and index alone."""
        ...

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Each completion's reward in [0, 1], in TRL's signature: columns are those of the examples, as lists."""
        ...

    @property
    def max_completion_length(self) -> int:
        """Tokens that the longest answer needs, the end of the sequence among them, if each byte is a token."""
        ...


@runtime_checkable
class MeasuredTask(Task, Protocol):
    """A task whose prompts have a length in tokens, so that it has to know the tokenizer."""

    def measure_with(self, count: Callable[[str], int]) -> None:
        """Take the function that counts the tokens of a prompt's text."""
        ...


# Of each method, how it is called and what it must return.
METHODS = {
    "example": ("example(split, index)", "a dict with the texts 'prompt' and 'answer'"),
    "reward": ("reward(prompts, completions, answer, **columns)", "a list with a float in [0, 1] for each completion"),
}
LENGTH = "max_completion_length"
LENGTH_RETURNS = "a positive int, the tokens that the longest answer needs"


def check_task(task: Any) -> None:
    """Check that an object implements Task.

    Raises:
        ValueError: naming its class, the member that is missing or of another kind, and what that must return.
    """
    flaw = flaw_of_methods(task)
    if flaw:
        raise ValueError(flaw)
    name = class_name(type(task))
    if not hasattr(task, LENGTH):
        raise ValueError(f"{name} is no task: it lacks the property {LENGTH}, which must return {LENGTH_RETURNS}")
    length = getattr(task, LENGTH)
    if callable(length):
        raise ValueError(f"{name} is no task: its {LENGTH} is a method; make it a property, {LENGTH_RETURNS}")
    if not isinstance(length, int | np.integer) or length < 1:
        raise ValueError(f"{name} is no task: its {LENGTH} is {length!r}; it must return {LENGTH_RETURNS}")


def check_example(task: Task, example: Any, with_answer: bool) -> None:
    """Check that a task's example is a dict with the text of a prompt, and of an answer unless it has turns.

    Raises:
        ValueError: naming the task's class and the column.
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
    """Return which method a class or an object needs to be a task, in a sentence; empty where it has them all."""
    name = class_name(task if isinstance(task, type) else type(task))
    for method, (call, returns) in METHODS.items():
        member = getattr(task, method, None)
        if member is None:
            return f"{name} is no task: it lacks the method {call}, which must return {returns}"
        if not callable(member):
            kind = type(member).__name__
            return f"{name} is no task: its {method} is no method but {kind}; {call} must return {returns}"
    return ""


def flaw_of_class(task: Any) -> str:
    """Return why the command line takes no class as a task, in a sentence.

    It compares annotations besides: those of methods must be Task's own.
    """
    if not isinstance(task, type):
        return f"{task!r} is no class: name the class of a task"
    flaw = flaw_of_methods(task)
    if flaw:
        return flaw
    other = [f"def {name}{ours}" for name in METHODS if (ours := _signature(Task, name)) != _signature(task, name)]
    return f"{class_name(task)} is annotated otherwise than hybridmem.tasks.Task: declare {' and '.join(other)}"


def class_name(kind: type) -> str:
    """Return a class's name with its module's."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _signature(kind: type, method: str) -> str:
    return str(inspect.signature(getattr(kind, method))).replace("typing.", "")


def example_generator(seed: int, split: Split, index: int) -> np.random.Generator:
    """The random numbers of one example: those of another seed, split or index are independent of them.

    Raises:
        ValueError: no such split, or an index below 0.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    if index < 0:
        raise ValueError(f"index must be at least 0, not {index}")
    return np.random.default_rng((seed, SPLITS.index(split), index))


def exact_match(completions: list[str], answer: list[str]) -> list[float]:
    """1 where a completion, without white space at its end, is the answer, else 0.

    A completion is the generated text up to its end of sequence.
    """
    return [float(completion.rstrip() == right) for completion, right in zip(completions, answer, strict=True)]
