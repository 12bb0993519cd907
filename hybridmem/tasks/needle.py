"""Needles in a haystack of real text, at any length (after RULER, arXiv 2404.06654).

A row is held-out text with `num_keys` assignments put between its lines, and a question about one of them:

    …  def close(self):
    needle_qzkv = 48213
            self.stream.close()
    …
    assert needle_qzkv == 48213

Only the value's tokens at the end have labels: a row is right where the model's first choice is right at all of
them. With several keys the others are distractors of the same form.
"""

from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of what is not predicted
KEY_LETTERS = 4


class Needle(NamedTuple):
    """A name and its value, as text."""

    key: str
    value: str


class NeedleRows(Dataset[dict[str, Int64[Tensor, " time"]]]):
    """Rows of `length` tokens as (input_ids, shift_labels, document_ids), int64 (time,), a document to a row.

    Row i asks for a needle at depth (i + 1/2) / num_rows of the haystack; the other needles follow at equal
    distances, going round. Each row depends on the seed and its number alone. Held-out text shorter than a row is
    repeated.

    Args:
        text: tokens of held-out text, without marks between documents.
        tokenizer: what made them; its bos (else eos) begins each row.
        length: tokens of a row, question and answer with them.
        num_keys: needles in a row.
        num_rows: rows.
        seed: of keys, values and the place in the text.

    Raises:
        ValueError: the row is too short for its needles, or the text has no lines.
    """

    def __init__(
        self,
        text: Integer[np.ndarray, " tokens"],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        *,
        num_keys: int = 1,
        num_rows: int = 20,
        seed: int = 0,
    ):
        self.text, self.tokenizer, self.length = text, tokenizer, length
        self.num_keys, self.num_rows, self.seed = num_keys, num_rows, seed
        self.ends_line = line_ends(text, tokenizer)
        if not self.ends_line.any():
            raise ValueError("needles are hidden between lines: the held-out text's tokens have no line ends")
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.start = [] if start is None else [start]
        self[0]  # a row too short is found now rather than in the middle of a test

    def __len__(self) -> int:
        """Rows."""
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Int64[Tensor, " time"]]:
        rng = np.random.default_rng((self.seed, index))
        needles = draw_needles(self.num_keys, rng)
        statements = [self.encode("\n", f"needle_{key} = {value}\n") for key, value in needles]
        asked = f"\nassert needle_{needles[0].key} =="
        question, answer = self.encode("x", asked), self.encode(asked, f" {needles[0].value}")

        # One token more than the row: inputs and labels are one apart.
        room = self.length + 1 - sum(map(len, [self.start, *statements, question, answer]))
        if room < 1:
            raise ValueError(
                f"needle_lengths: a row of {self.length} tokens cannot hold needle_keys={self.num_keys} and a "
                f"question, which take {self.length + 1 - room}: raise needle_lengths or lower needle_keys"
            )
        depths = ((index + 0.5) / self.num_rows + np.arange(self.num_keys) / self.num_keys) % 1
        haystack = self.hide(statements, depths, self.slice_of_text(room, rng))
        tokens = torch.tensor([*self.start, *haystack, *question, *answer])
        labels = tokens[1:].clone()
        labels[: -len(answer)] = IGNORED
        return {
            "input_ids": tokens[:-1],
            "shift_labels": labels,
            "document_ids": torch.full_like(labels, index),
        }

    def encode(self, before: str, text: str) -> list[int]:
        """The tokens of a text that stands after another, without the space that some tokenizers begin with."""
        prefix, whole, alone = self.tokenizer([before, before + text, text], add_special_tokens=False)["input_ids"]
        return whole[len(prefix) :] if whole[: len(prefix)] == prefix else alone

    def slice_of_text(self, size: int, rng: np.random.Generator) -> Int64[np.ndarray, " size"]:
        """Places of `size` tokens of the text, from the start of one of its lines on, going round."""
        start = rng.choice(np.flatnonzero(self.ends_line)) + 1
        return (start + np.arange(size)) % len(self.text)

    def hide(self, statements: list[list[int]], depths: np.ndarray, places: Int64[np.ndarray, " size"]) -> list[int]:
        """The text at `places` with each statement put at the start of the line nearest to its depth."""
        line_starts = np.concatenate([[0], np.flatnonzero(self.ends_line[places]) + 1])
        nearest = np.abs(line_starts - depths[:, None] * len(places)).argmin(1)
        haystack: list[int] = []
        done = 0
        for which in depths.argsort():
            line_start = line_starts[nearest[which]]
            haystack += self.text[places[done:line_start]].tolist() + statements[which]
            done = line_start
        return haystack + self.text[places[done:]].tolist()


def line_ends(text: Integer[np.ndarray, " tokens"], tokenizer: PreTrainedTokenizerBase) -> Bool[np.ndarray, " tokens"]:
    """Which tokens of a text end a line."""
    used = np.unique(text)
    ending = [token for token in used.tolist() if tokenizer.decode([token]).endswith("\n")]
    return np.isin(text, ending)


def draw_needles(num_keys: int, rng: np.random.Generator) -> list[Needle]:
    """Needles with keys of random letters and values of five digits, no key or value twice."""
    keys = rng.choice(len(ascii_lowercase) ** KEY_LETTERS, num_keys, replace=False)
    values = 10_000 + rng.choice(90_000, num_keys, replace=False)
    return [Needle(_spell(int(key)), str(value)) for key, value in zip(keys, values, strict=True)]


def _spell(number: int) -> str:
    letters = []
    for _ in range(KEY_LETTERS):
        number, letter = divmod(number, len(ascii_lowercase))
        letters.append(ascii_lowercase[letter])
    return "".join(letters)
