"""A puzzle in a context of any size, and the material for puzzles."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from hybridmem.tasks.facts import Paragraphs
from hybridmem.tasks.task import Split

WORD = re.compile(r"(?<![\w.\-])[a-z]{4,8}(?![\w.(=\-])")
ENOUGH_WORDS = 2000
FEWEST_WORDS = 40
BREAK = re.compile(r"\n|(?<=[.!?]) ")  # after which a sentence begins


@dataclass(frozen=True)
class Puzzle:
    """Puzzle: a task, a context, a question, and the strings of the right answer.

    `context(size)` has about `size` characters more than `context(0)`, the puzzle's shortest context.
    `beginning` starts an answer.
    """

    task: str
    context: Callable[[int], str]
    question: str
    beginning: str
    answers: list[str]


@dataclass
class Material:
    """Text and words of a split's files.

    Args:
        paragraphs: paragraphs of all files.
        split: split whose files to read.
    """

    paragraphs: Paragraphs
    split: Split

    def text(self, size: int, rng: np.random.Generator) -> str:
        """Return `size` characters of text; with the same random numbers, a longer text continues a shorter one."""
        return "\n".join(self.paragraphs.text(self.split, size + 1, rng)) if size > 0 else ""

    @cached_property
    def words(self) -> list[str]:
        """Return sorted lower-case words of four to eight letters, from enough training files for ENOUGH_WORDS.

        Raises:
            ValueError: there are fewer words than puzzles need.
        """
        found: set[str] = set()
        for file in self.paragraphs.files["train"]:
            if len(found) >= ENOUGH_WORDS:
                break
            found.update(*(WORD.findall(paragraph) for paragraph in self.paragraphs.of(file)))
        if len(found) < FEWEST_WORDS:
            raise ValueError(
                f"path: the training files hold {len(found)} different words of four to eight letters, and puzzles "
                f"need {FEWEST_WORDS}: give more text"
            )
        return sorted(found)


@lru_cache(maxsize=4)
def materials(path: str | None, pattern: str, val_fraction: float, seed: int) -> dict[Split, Material]:
    """Return the material of both splits, read once for all tasks of the same files."""
    paragraphs = Paragraphs(path, pattern, val_fraction, seed)
    return {"train": Material(paragraphs, "train"), "val": Material(paragraphs, "val")}


def scatter(text: str, statements: Sequence[str], depths: np.ndarray) -> str:
    """Insert each statement before the sentence nearest to its depth in [0, 1]; depths must not decrease."""
    starts = np.array([0, *(match.end() for match in BREAK.finditer(text)), len(text)])
    pieces, done = [], 0
    for statement, depth in zip(statements, depths, strict=True):
        start = int(starts[np.abs(starts - depth * len(text)).argmin()])
        pieces += [text[done:start], statement, " "]
        done = start
    return "".join([*pieces, text[done:]])


def join_words(words: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
