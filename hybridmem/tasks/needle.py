"""Needles in a haystack of real text of any length (after RULER, arXiv 2404.06654).

A row is held-out text with `num_keys` assignments inserted between its lines, and a question about one of them:

    …  def close(self):
    needle_qzkv = 48213
            self.stream.close()
    …
    assert needle_qzkv == 48213

Only the tokens of the value at the end have labels; a row is correct if greedy predictions match all of them. With
several keys, the other assignments are distractors.
"""

from string import ascii_lowercase
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of tokens without loss
KEY_LETTERS = 4


class Needle(NamedTuple):
    """Key and value of an assignment, as text."""

    key: str
    value: str


class NeedleRows(Dataset[dict[str, Int64[Tensor, " time"]]]):
    """Rows of `length` tokens as (input_ids, shift_labels, document_ids), int64 (time,), with one document per row.

    Row i asks for a needle at depth (i + 1/2) / num_rows of the haystack; the other needles follow at equal distances
    and wrap around. A row depends on the seed and its index only. Held-out text shorter than a row is repeated.

    Args:
        text: the tokens of held-out text, without separators between documents.
        tokenizer: the text's tokenizer; each row starts with its BOS, or else its EOS.
        length: the number of tokens in a row, question and answer included.
        num_keys: the number of needles in a row.
        num_rows: the number of rows.
        seed: seeds the keys, the values and the position in the text.

    Raises:
        ValueError: A row is too short for its needles, or the text has no line breaks.
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
            raise ValueError(
                "needles go between lines, but no token of the held-out text ends a line; use text with line breaks"
            )
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.start = [] if start is None else [start]
        self[0]  # raises early if rows are too short

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Int64[Tensor, " time"]]:
        rng = np.random.default_rng((self.seed, index))
        needles = draw_needles(self.num_keys, rng)
        statements = [self.encode("\n", f"needle_{key} = {value}\n") for key, value in needles]
        asked = f"\nassert needle_{needles[0].key} =="
        question, answer = self.encode("x", asked), self.encode(asked, f" {needles[0].value}")

        # One extra token, because labels are shifted by one.
        room = self.length + 1 - sum(map(len, [self.start, *statements, question, answer]))
        if room < 1:
            raise ValueError(
                f"needle_lengths={self.length} is too short for needle_keys={self.num_keys} and the question, which "
                f"take {self.length + 1 - room} tokens; raise needle_lengths or lower needle_keys"
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
        """Return the tokens of a text that follows another, without the leading space that some tokenizers add."""
        prefix, whole, alone = self.tokenizer([before, before + text, text], add_special_tokens=False)["input_ids"]
        return whole[len(prefix) :] if whole[: len(prefix)] == prefix else alone

    def slice_of_text(self, size: int, rng: np.random.Generator) -> Int64[np.ndarray, " size"]:
        """Return `size` positions of the text from the start of a random line on, with wrap-around."""
        start = rng.choice(np.flatnonzero(self.ends_line)) + 1
        return (start + np.arange(size)) % len(self.text)

    def hide(self, statements: list[list[int]], depths: np.ndarray, places: Int64[np.ndarray, " size"]) -> list[int]:
        """Insert each statement into the text at `places`, at the line start nearest to its depth."""
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
    """Return a mask of the tokens that end a line."""
    used = np.unique(text)
    ending = [token for token in used.tolist() if tokenizer.decode([token]).endswith("\n")]
    return np.isin(text, ending)


def draw_needles(num_keys: int, rng: np.random.Generator) -> list[Needle]:
    """Draw needles with distinct keys of random letters and distinct values of five digits."""
    keys = rng.choice(len(ascii_lowercase) ** KEY_LETTERS, num_keys, replace=False)
    values = 10_000 + rng.choice(90_000, num_keys, replace=False)
    return [Needle(_spell(int(key)), str(value)) for key, value in zip(keys, values, strict=True)]


def _spell(number: int) -> str:
    letters = []
    for _ in range(KEY_LETTERS):
        number, letter = divmod(number, len(ascii_lowercase))
        letters.append(ascii_lowercase[letter])
    return "".join(letters)
