"""Visual search: a field of handwritten digits, one image patch each, and a question about it.

3 1 8
5 7 1      where is the 7?   answer  2,2
1 0 4      how many 1s?      answer  3
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float32, Int

from hybridmem.checks import at_least, between_0_and_1, number_held_out

from .task import END_OF_ANSWER, Split, exact_match, example_generator

Question = Literal["where", "count"]
QUESTIONS: tuple[Question, ...] = get_args(Question)
NUM_DIGITS = 10
BRIGHTEST = 16.0  # the images' pixels are 0 to 16


class VisualSearch:
    """A grid of scikit-learn's handwritten digits, 8×8 pixels each, and where one is or how many there are.

    Examples have `images` beside the text, float32 (grid², 64) in [0, 1]: a patch per digit, row by row. "where"
    asks for the row and the column, from 1 on, of a digit that the grid holds once; "count" for how often it holds
    a digit, each number up to `grid` as likely as any other. The images themselves are split: none is in training
    and validation. The column `question` names the kind.

    Needs scikit-learn (`pip install hybridmem[data]`).

    Args:
        grid: digits on a side.
        questions: kinds of questions, "where" and "count"; each example draws one.
        val_fraction: share of the images of each digit to hold out.
        seed: of the split and of all examples.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: settings that cannot be.
    """

    def __init__(
        self, grid: int = 4, questions: Sequence[Question] = QUESTIONS, val_fraction: float = 0.2, seed: int = 0
    ):
        at_least(1, grid=grid)
        at_least(0, seed=seed)
        if not questions or not set(questions) <= set(QUESTIONS):
            raise ValueError(f"questions={list(questions)} must name one or more of {', '.join(QUESTIONS)}")
        between_0_and_1(val_fraction=val_fraction)
        self.grid, self.questions, self.val_fraction, self.seed = grid, list(questions), val_fraction, seed
        self.patches = split_patches(*load_patches(), val_fraction, seed)

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """{"prompt", "answer", "images" (grid², 64), "question"}."""
        rng = example_generator(self.seed, split, index)
        question = str(rng.choice(self.questions))
        asked = int(rng.integers(NUM_DIGITS))
        occurrences = 1 if question == "where" else int(rng.integers(self.grid + 1))
        field = draw_field(asked, occurrences, self.grid**2, rng)
        images = np.stack([rng.choice(self.patches[split][digit]) for digit in field.tolist()])
        if question == "where":
            row, column = divmod(int(np.flatnonzero(field == asked)[0]), self.grid)
            prompt, answer = f"where is the {asked}?", f"{row + 1},{column + 1}"
        else:
            prompt, answer = f"how many {asked}s?", str(occurrences)
        return {"prompt": prompt, "answer": answer, "images": torch.from_numpy(images), "question": question}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """1 for the exact answer, else 0."""
        return exact_match(completions, answer)

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest answer and its end, if each byte is a token."""
        longest = {"where": f"{self.grid},{self.grid}", "count": f"{self.grid}"}
        return max(len(longest[question]) for question in self.questions) + END_OF_ANSWER


def load_patches() -> tuple[Float32[np.ndarray, "images 64"], Int[np.ndarray, " images"]]:
    """All images in [0, 1], and the digit of each."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError("VisualSearch takes its digits from scikit-learn: pip install hybridmem[data]") from error
    images, digits = load_digits(return_X_y=True)
    return (images / BRIGHTEST).astype(np.float32), digits


def split_patches(
    images: Float32[np.ndarray, "images 64"], digits: Int[np.ndarray, " images"], val_fraction: float, seed: int
) -> dict[Split, list[Float32[np.ndarray, "_ 64"]]]:
    """The images of each digit, to train on and, a fraction drawn by `seed`, to validate on."""
    rng = np.random.default_rng((seed,))
    train, val = [], []
    for digit in range(NUM_DIGITS):
        shuffled = rng.permutation(images[digits == digit])
        held_out = number_held_out(val_fraction, len(shuffled), f"the {len(shuffled)} images of {digit}")
        val.append(shuffled[:held_out])
        train.append(shuffled[held_out:])
    return {"train": train, "val": val}


def draw_field(asked: int, occurrences: int, cells: int, rng: np.random.Generator) -> Int[np.ndarray, " cells"]:
    """The digits of a grid: the asked one in so many of its cells, others elsewhere."""
    field = (asked + rng.integers(1, NUM_DIGITS, cells)) % NUM_DIGITS
    field[rng.choice(cells, occurrences, replace=False)] = asked
    return field
