"""What a task with a checkable answer offers, and what all of them share."""

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
