"""Visual search in a grid of handwritten digits, one image patch per digit.

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
BRIGHTEST = 16.0  # pixels range from 0 to 16


class VisualSearch:
    """A grid of scikit-learn's handwritten digits, 8×8 pixels each, and a question about a digit's place or count.

    Examples have a column `images`, float32 (grid², 64) in [0, 1], with one patch per digit in row-major order. "where"
    asks for the row and column, counted from 1, of a digit that occurs once. "count" asks for the number of occurrences
    of a digit, uniform from 0 to `grid`. Images are held out, so training and validation share none. The column
    `question` is the kind of question.

    Needs scikit-learn (`pip install hybridmem[data]`).

    Args:
        grid: the number of digits per side.
        questions: kinds of questions, "where" and "count"; each example draws one.
        val_fraction: the fraction of each digit's images to hold out.
        seed: seeds the split and all examples.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: A setting is out of range.
    """

    def __init__(
        self, grid: int = 4, questions: Sequence[Question] = QUESTIONS, val_fraction: float = 0.2, seed: int = 0
    ):
        at_least(1, grid=grid)
        at_least(0, seed=seed)
        if not questions or not set(questions) <= set(QUESTIONS):
            raise ValueError(f"questions={list(questions)} must contain one or more of {', '.join(QUESTIONS)}")
        between_0_and_1(val_fraction=val_fraction)
        self.grid, self.questions, self.val_fraction, self.seed = grid, list(questions), val_fraction, seed
        self.patches = split_patches(*load_patches(), val_fraction, seed)

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "images" (grid², 64), "question"}."""
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
        """Return 1 for exact answers and 0 for others."""
        return exact_match(completions, answer)

    @property
    def max_completion_length(self) -> int:
        """Return the number of tokens in the longest answer, EOS included, with one token per byte."""
        longest = {"where": f"{self.grid},{self.grid}", "count": f"{self.grid}"}
        return max(len(longest[question]) for question in self.questions) + END_OF_ANSWER


def load_patches() -> tuple[Float32[np.ndarray, "images 64"], Int[np.ndarray, " images"]]:
    """Load all images, scaled to [0, 1], and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ImportError("VisualSearch needs scikit-learn: pip install hybridmem[data]") from error
    images, digits = load_digits(return_X_y=True)
    return (images / BRIGHTEST).astype(np.float32), digits


def split_patches(
    images: Float32[np.ndarray, "images 64"], digits: Int[np.ndarray, " images"], val_fraction: float, seed: int
) -> dict[Split, list[Float32[np.ndarray, "_ 64"]]]:
    """Split the images of each digit at random into training images and a fraction of validation images."""
    rng = np.random.default_rng((seed,))
    train, val = [], []
    for digit in range(NUM_DIGITS):
        shuffled = rng.permutation(images[digits == digit])
        held_out = number_held_out(val_fraction, len(shuffled), f"images of {digit}")
        val.append(shuffled[:held_out])
        train.append(shuffled[held_out:])
    return {"train": train, "val": val}


def draw_field(asked: int, occurrences: int, cells: int, rng: np.random.Generator) -> Int[np.ndarray, " cells"]:
    """Draw the digits of a grid, with the asked digit in exactly `occurrences` cells."""
    field = (asked + rng.integers(1, NUM_DIGITS, cells)) % NUM_DIGITS
    field[rng.choice(cells, occurrences, replace=False)] = asked
    return field
