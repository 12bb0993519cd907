"""Key–value recall over a distance of one or many attention windows.

    qm=xkc rz ufo wd=pab e hsoq …  ab=uvw … lt nqmi ?wd=            answer  pab
    qm=wd  rz ufo wd=pab e hsoq …  ab=uv  … lt nqmi ?qm=            answer  wd=pab     (hops=2)

Words of random letters separate the pairs. All prompts of a task have equal length and differ in the position of the
asked pair.
"""

from collections.abc import Sequence
from itertools import takewhile
from string import ascii_lowercase
from typing import Any

import numpy as np

from hybridmem.checks import at_least

from .task import END_OF_ANSWER, Split, exact_match, example_generator

LETTERS = np.array([*ascii_lowercase])
FILLER = np.array([*ascii_lowercase, *"    "])  # words of six letters or so
MOST_BYTES = 10**7  # of a prompt; longer ones take minutes to tokenise


class Recall:
    """Key–value pairs in filler text, then a key; the answer is its value.

    The column `distance` is the distance of the asked pair: its value ends `distance` · `window` bytes before the end
    of the prompt. A stack of window-attention layers reaches back by the number of layers times the window; beyond
    that, answers need a memory. With several hops, the distance refers to the first pair of the chain, and the other
    pairs are anywhere.

    Args:
        num_pairs: the number of key–value pairs in a prompt.
        key_length: the number of letters in a key; keys are unique within a prompt.
        value_length: the number of letters in a value.
        hops: the number of lookups to the answer. With two or more, each value is the next key, and the answer is the
            whole chain.
        num_distractors: the number of pairs, among `num_pairs`, whose key differs from the asked one in one letter.
        distance: possible distances of the asked pair in windows; each example draws one.
        window: the number of bytes in a window.
        partial_credit: reward the fraction of correct leading characters instead of exact matches only.
        seed: seeds all examples.

    Raises:
        ValueError: The settings leave too little room or too few keys for the pairs.
    """

    def __init__(
        self,
        num_pairs: int = 6,
        key_length: int = 2,
        value_length: int = 3,
        hops: int = 1,
        num_distractors: int = 0,
        distance: Sequence[int] = (1, 2, 4),
        window: int = 32,
        partial_credit: bool = False,
        seed: int = 0,
    ):
        at_least(1, num_pairs=num_pairs, key_length=key_length, value_length=value_length, hops=hops, window=window)
        at_least(0, num_distractors=num_distractors, seed=seed)
        if not distance:
            raise ValueError("distance is empty; set at least one distance")
        at_least(1, distance=min(distance))
        if max(distance) * window >= MOST_BYTES:
            raise ValueError(
                f"distance={max(distance)} times window={window} must be below {MOST_BYTES} bytes; lower one of them"
            )
        self.num_pairs, self.key_length, self.value_length = num_pairs, key_length, value_length
        self.hops, self.num_distractors = hops, num_distractors
        self.distance, self.window = list(distance), window
        self.partial_credit, self.seed = partial_credit, seed
        self.question_length = key_length + 2  # ?key=
        self.pair_length = key_length + value_length + 2  # key=value and a space
        self._check_keys()
        self._check_room()

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "distance" in windows}."""
        rng = example_generator(self.seed, split, index)
        distance = int(rng.choice(self.distance))
        keys, values = self._draw_pairs(rng)
        asked, *others = [f"{key}={value} " for key, value in zip(keys, values, strict=True)]
        others = rng.permutation(others).tolist()
        before, after = self._room(distance)
        # All positions are equally likely, so the number of pairs before the asked one is hypergeometric.
        first = rng.hypergeometric(before // self.pair_length, after // self.pair_length, len(others))
        context = scatter(others[:first], before, rng) + asked + scatter(others[first:], after, rng)
        answer = "=".join([*keys[1 : self.hops], values[self.hops - 1]])
        return {"prompt": f"{context}?{keys[0]}=", "answer": answer, "distance": distance}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return 1 for the exact answer and 0 otherwise, or the fraction of correct leading characters."""
        if not self.partial_credit:
            return exact_match(completions, answer)
        return [leading_share(text.rstrip(), right) for text, right in zip(completions, answer, strict=True)]

    @property
    def max_completion_length(self) -> int:
        """Return the number of tokens in an answer, EOS included, with one token per byte."""
        return self.hops * (self.value_length + 1) - 1 + END_OF_ANSWER

    def _room(self, distance: int) -> tuple[int, int]:
        """Return the number of bytes before the asked pair, and between its end and the question."""
        before = (max(self.distance) - distance) * self.window
        return before, distance * self.window - 1 - self.question_length  # 1: the space that ends the pair

    def _check_keys(self) -> None:
        if self.hops > 1 and self.value_length != self.key_length:
            raise ValueError(
                f"hops={self.hops} makes keys of values: set value_length={self.value_length} to key_length="
                f"{self.key_length}"
            )
        if self.hops + self.num_distractors > self.num_pairs:
            raise ValueError(
                f"num_pairs={self.num_pairs} must be at least hops + num_distractors = "
                f"{self.hops + self.num_distractors}"
            )
        keys, neighbours = len(LETTERS) ** self.key_length, (len(LETTERS) - 1) * self.key_length
        if self.num_pairs > keys or self.num_distractors > neighbours:
            raise ValueError(
                f"key_length={self.key_length} gives {keys} keys, {neighbours} of them one letter from the asked one: "
                f"too few for num_pairs={self.num_pairs} with num_distractors={self.num_distractors}; raise key_length"
            )

    def _check_room(self) -> None:
        for distance in self.distance:
            before, after = self._room(distance)
            if after < 0:
                raise ValueError(
                    f"window={self.window} is too short for the question of {self.question_length} bytes; raise window"
                )
            room = before // self.pair_length + after // self.pair_length
            if self.num_pairs - 1 > room:
                raise ValueError(
                    f"num_pairs={self.num_pairs} of {self.pair_length} bytes do not fit: with distance={distance} out "
                    f"of {self.distance} and window={self.window}, a prompt has room for {room + 1}; lower "
                    f"num_pairs, key_length={self.key_length} or value_length={self.value_length}, or raise window or "
                    "the largest distance"
                )

    def _draw_pairs(self, rng: np.random.Generator) -> tuple[list[str], list[str]]:
        """Draw keys and values, ordered as chain, distractors, other pairs."""
        asked = spell(self.key_length, rng)
        distractors = rng.permutation(neighbours_of(asked))[: self.num_distractors].tolist()
        drawn = dict.fromkeys([asked, *distractors])
        while len(drawn) < self.num_pairs:
            drawn[spell(self.key_length, rng)] = None
        others = [*drawn][1 + self.num_distractors :]
        keys = [asked, *others[: self.hops - 1], *distractors, *others[self.hops - 1 :]]
        ends = [spell(self.value_length, rng) for _ in keys[self.hops - 1 :]]
        return keys, [*keys[1 : self.hops], *ends]


def scatter(pairs: list[str], length: int, rng: np.random.Generator) -> str:
    """Place pairs, in their order, at random positions of a filler text with `length` bytes in total."""
    free = length - sum(map(len, pairs))
    cuts = np.sort(rng.integers(0, free + 1, len(pairs))).tolist()
    text = filler(free, cuts, rng)
    pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, free], strict=True)]
    return pieces[0] + "".join(pair + piece for pair, piece in zip(pairs, pieces[1:], strict=True))


def filler(length: int, cuts: list[int], rng: np.random.Generator) -> str:
    """Return words of random letters; a word ends at each cut and at the end."""
    letters = rng.choice(FILLER, length)
    ends = np.array([cut - 1 for cut in [*cuts, length] if cut > 0], dtype=np.int64)
    letters[ends] = " "
    return "".join(letters.tolist())


def spell(length: int, rng: np.random.Generator) -> str:
    """Return random letters."""
    return "".join(rng.choice(LETTERS, length).tolist())


def neighbours_of(key: str) -> list[str]:
    """Return all keys that differ from a key in one letter."""
    return [
        key[:place] + letter + key[place + 1 :]
        for place, right in enumerate(key)
        for letter in ascii_lowercase
        if letter != right
    ]


def leading_share(text: str, answer: str) -> float:
    """Return the length of the common prefix of two texts, divided by the length of the longer one."""
    agreeing = takewhile(lambda pair: pair[0] == pair[1], zip(text, answer, strict=False))
    return sum(1 for _ in agreeing) / max(len(text), len(answer))
