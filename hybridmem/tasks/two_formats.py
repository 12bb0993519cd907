"""Sums with digit-by-digit workings in one of two formats, to observe format collapse (after arXiv 2504.07912).

37,45:       equation   7+5=12, 3+4=7, so 82
             python     a=7+5#12;b=3+4#7;r=82
"""

import re
from string import ascii_lowercase
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64

from hybridmem.checks import at_least, between_0_and_1, number_held_out

from .task import END_OF_ANSWER, Split, example_generator

MOST_DIGITS = 3  # the split enumerates all pairs of numbers
FINAL_ANSWER = re.compile(r"(?<!\d)0*(\d+)\s*$")


class TwoFormats:
    """The sum of two numbers. Answers use one of two formats; the reward accepts the right sum in any format.

    Both formats contain the same numbers in the same order: the sum of each pair of digits, starting with the ones,
    then the total. Their lengths differ by one byte per digit, so that they differ in notation but not in difficulty.

        equation   7+5=12, 3+4=7, so 82
        python     a=7+5#12;b=3+4#7;r=82

    The column `format` is the format of `answer`, drawn for every example independently of the prompt. The number at
    the end of a completion is its result. Pairs of numbers are held out, so training and validation share none.

    Args:
        mixture: the fraction of answers in the format `equation`; the others are in `python`.
        digits: the number of digits in both numbers, from 1 to 3.
        val_fraction: the fraction of pairs to hold out.
        seed: seeds the split and all examples.

    Raises:
        ValueError: A setting is out of range.
    """

    # Patterns of complete answers, right or wrong, for FormatShare.
    formats: ClassVar[dict[str, str]] = {
        "equation": r"^(\d\+\d=\d+, )+so \d+\s*$",
        "python": r"^([a-z]=\d\+\d#\d+;)+r=\d+\s*$",
    }

    def __init__(self, mixture: float = 0.5, digits: int = 2, val_fraction: float = 0.2, seed: int = 0):
        at_least(1, digits=digits)
        at_least(0, seed=seed)
        if digits > MOST_DIGITS:
            raise ValueError(f"digits={digits} must be at most {MOST_DIGITS}")
        if not 0 <= mixture <= 1:
            raise ValueError(f"mixture={mixture} must be between 0 and 1, the fraction of answers in format equation")
        between_0_and_1(val_fraction=val_fraction)
        self.mixture, self.digits, self.val_fraction, self.seed = mixture, digits, val_fraction, seed
        self.pairs = split_pairs(digits, val_fraction, seed)

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "format"}."""
        rng = example_generator(self.seed, split, index)
        first, second = rng.choice(self.pairs[split]).tolist()
        chosen = "equation" if rng.random() < self.mixture else "python"
        write = write_equation if chosen == "equation" else write_python
        return {"prompt": f"{first},{second}:", "answer": write(first, second), "format": chosen}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return 1 for completions that end with the right sum, in any format, and 0 for others."""
        return [float(right) for right in self.is_right(completions, answer)]

    def is_right(self, completions: list[str], answers: list[str]) -> list[bool]:
        """Return True for completions that end with the answer's sum."""
        return [self.final_answer(c) == self.final_answer(a) for c, a in zip(completions, answers, strict=True)]

    @staticmethod
    def final_answer(completion: str) -> str | None:
        """Return the number at the end of a completion, or None."""
        found = FINAL_ANSWER.search(completion)
        return found[1] if found else None

    @property
    def max_completion_length(self) -> int:
        """Return the number of tokens in the longest answer, EOS included, with one token per byte."""
        largest = 10**self.digits - 1
        return len(write_python(largest, largest)) + END_OF_ANSWER


def split_pairs(digits: int, val_fraction: float, seed: int) -> dict[Split, Int64[np.ndarray, "_ 2"]]:
    """Split all pairs of numbers with `digits` digits at random into training pairs and a fraction for validation."""
    least = 0 if digits == 1 else 10 ** (digits - 1)
    numbers = np.arange(least, 10**digits)
    pairs = np.stack(np.meshgrid(numbers, numbers), axis=-1).reshape(-1, 2)
    held_out = number_held_out(val_fraction, len(pairs), "pairs")
    shuffled = np.random.default_rng((seed,)).permutation(pairs)
    return {"train": shuffled[held_out:], "val": shuffled[:held_out]}


def write_equation(first: int, second: int) -> str:
    """Write a sum as in `7+5=12, 3+4=7, so 82`."""
    steps = "".join(f"{a}+{b}={a + b}, " for a, b in digits_of(first, second))
    return f"{steps}so {first + second}"


def write_python(first: int, second: int) -> str:
    """Write a sum as in `a=7+5#12;b=3+4#7;r=82`."""
    named = zip(ascii_lowercase, digits_of(first, second), strict=False)
    steps = "".join(f"{name}={a}+{b}#{a + b};" for name, (a, b) in named)
    return f"{steps}r={first + second}"


def digits_of(first: int, second: int) -> list[tuple[int, int]]:
    """Return the pairs of digits of two numbers of equal length, starting with the ones."""
    return [(int(a), int(b)) for a, b in zip(reversed(str(first)), reversed(str(second)), strict=True)]
