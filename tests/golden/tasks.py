"""Tiny tasks over seventeen words that an untrained policy sometimes solves."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
ENDS = (".", "!", ";")  # end a turn like <eos>, which keeps turns short
WORDS = (PAD, BOS, EOS, UNKNOWN, *"abcdef", "door", "no", "hear", "now", *ENDS)
END_IDS = [WORDS.index(word) for word in (EOS, *ENDS)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    words = models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=UNKNOWN)
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )


def write_tokenizer(folder: Path) -> str:
    """Save the tokenizer and return its folder."""
    word_tokenizer().save_pretrained(folder)
    return str(folder)


class Words:
    """Task whose answers consist of given words.

    Args:
        right: the words that earn a reward.
        binary: reward the first word with 0 or 1, instead of the share of right words.
        length: the length of every prompt in words; None draws one to five words.
    """

    max_completion_length = 6

    def __init__(self, right: str = "abc", binary: bool = False, length: int | None = None):
        self.right, self.binary, self.length = right, binary, length

    def example(self, split: str, index: int) -> dict[str, Any]:
        """Return a prompt and a right answer."""
        length = self.length or 1 + index % 5
        letters = ["abcdef"[(index * 5 + place * (index + 1)) % 6] for place in range(length)]
        return {"prompt": " ".join(letters), "answer": " ".join(self.right[: 1 + index % 2])}

    def reward(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Reward right words."""
        return [self._reward(completion.split()) for completion in completions]

    def is_right(self, completions: list[str], answers: list[str]) -> list[bool]:
        """Return True if the first word is right."""
        return [completion[:1] in set(self.right) for completion in completions]

    def _reward(self, words: list[str]) -> float:
        hits = [float(word in self.right) for word in words] or [0.0]
        return hits[0] if self.binary else sum(hits) / len(hits)


class Doors:
    """Environment with two doors, one of which leads out; the other one answers no, and all else is an error."""

    def reset(self, answer: str, **columns: Any) -> str | None:
        """Start an episode with the given right door."""
        self.answer, self.found, self.done = answer, False, False
        return None

    def get_reward(self) -> float:
        """Return 1 after the right door was opened, else 0."""
        return float(self.found)

    def a(self, rest: str = "") -> str:
        """Open the first door."""
        return self._open("a")

    def b(self, rest: str = "") -> str:
        """Open the second door."""
        return self._open("b")

    def _open(self, door: str) -> str:
        self.found = self.done = door == self.answer
        return "no"


class TwoDoors:
    """Multi-turn task with two doors."""

    environment = Doors
    max_completion_length = 24

    def example(self, split: str, index: int) -> dict[str, Any]:
        """Return a prompt, the right door, and a demonstration."""
        right = "ab"[index % 2]
        turns = [("a", "no"), ("b", "")] if right == "b" else [("a", "")]
        return {"prompt": " ".join(["door"] * (1 + index % 3)), "answer": right, "turns": turns}

    def reward(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Raise an error, because the environment provides the reward."""
        raise AssertionError("not asked")
