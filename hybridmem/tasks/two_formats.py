"""Sums worked out digit by digit, in one of two formats: does reward leave both alive? (after arXiv 2504.07912)

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

MOST_DIGITS = 3  # all pairs of numbers are listed, to split them
FINAL_ANSWER = re.compile(r"(?<!\d)0*(\d+)\s*$")


class TwoFormats:
    """The sum of two numbers. A supervised answer works it out in one of two formats; rewarded is the right sum in any.

    Both formats write the same numbers in the same order, each pair of digits with its sum, the ones first, then the
    whole sum, and differ by a byte a digit in length: neither is easier but by how it is written.

        equation   7+5=12, 3+4=7, so 82
        python     a=7+5#12;b=3+4#7;r=82

    The column `format` names the one that `answer` is in; it is drawn anew for every example, and nothing in the
    prompt tells it. What a completion answers is the number at its end. Pairs of numbers are held out: none is in
    training and validation.

    Args:
        mixture: the share of answers in the format `equation`; the others are in `python`.
        digits: of both numbers, from 1 to 3.
        val_fraction: share of the pairs to hold out.
        seed: of the split and of all examples.

    Raises:
        ValueError: settings that cannot be.
    """

    # For FormatShare: whole answers, right or wrong; what is of neither form is of neither format.
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
            raise ValueError(f"mixture={mixture} is the share of one of two formats: it must lie between 0 and 1")
        between_0_and_1(val_fraction=val_fraction)
        self.mixture, self.digits, self.val_fraction, self.seed = mixture, digits, val_fraction, seed
        self.pairs = split_pairs(digits, val_fraction, seed)

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """{"prompt", "answer", "format"}."""
        rng = example_generator(self.seed, split, index)
        first, second = rng.choice(self.pairs[split]).tolist()
        chosen = "equation" if rng.random() < self.mixture else "python"
        write = write_equation if chosen == "equation" else write_python
        return {"prompt": f"{first},{second}:", "answer": write(first, second), "format": chosen}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """1 for the right sum at the end, in whatever format, else 0."""
        return [float(right) for right in self.is_right(completions, answer)]

    def is_right(self, completions: list[str], answers: list[str]) -> list[bool]:
        """Whether a completion's number is that of the answer."""
        return [self.final_answer(c) == self.final_answer(a) for c, a in zip(completions, answers, strict=True)]

    @staticmethod
    def final_answer(completion: str) -> str | None:
        """The number that a completion ends with; None where it ends with none."""
        found = FINAL_ANSWER.search(completion)
        return found[1] if found else None

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest answer and its end, if each byte is a token."""
        largest = 10**self.digits - 1
        return len(write_python(largest, largest)) + END_OF_ANSWER


def split_pairs(digits: int, val_fraction: float, seed: int) -> dict[Split, Int64[np.ndarray, "_ 2"]]:
    """The pairs of numbers of so many digits to train on and, a fraction drawn by `seed`, to validate on."""
    least = 0 if digits == 1 else 10 ** (digits - 1)
    numbers = np.arange(least, 10**digits)
    pairs = np.stack(np.meshgrid(numbers, numbers), axis=-1).reshape(-1, 2)
    held_out = number_held_out(val_fraction, len(pairs), f"{len(pairs)} pairs", ", or raise digits")
    shuffled = np.random.default_rng((seed,)).permutation(pairs)
    return {"train": shuffled[held_out:], "val": shuffled[:held_out]}


def write_equation(first: int, second: int) -> str:
    """7+5=12, 3+4=7, so 82."""
    steps = "".join(f"{a}+{b}={a + b}, " for a, b in digits_of(first, second))
    return f"{steps}so {first + second}"


def write_python(first: int, second: int) -> str:
    """a=7+5#12;b=3+4#7;r=82."""
    named = zip(ascii_lowercase, digits_of(first, second), strict=False)
    steps = "".join(f"{name}={a}+{b}#{a + b};" for name, (a, b) in named)
    return f"{steps}r={first + second}"


def digits_of(first: int, second: int) -> list[tuple[int, int]]:
    """The digits of two numbers of one length side by side, the ones first."""
    return [(int(a), int(b)) for a, b in zip(reversed(str(first)), reversed(str(second)), strict=True)]
