"""RULER's synthetic tasks on real text, at any length in any tokenizer's tokens (after arXiv 2404.06654).

A magic number is hidden in the text below. Remember it: a question about it follows the text.

Return the canonical form of a path. The magic number of quiet-archive is 4821733. Raise OSError if …

What is the magic number of quiet-archive?                                                answer  4821733
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from hybridmem.checks import at_least, between_0_and_1, one_of
from hybridmem.tasks.task import END_OF_ANSWER, Split, example_generator

from .counting import NUM_COMMON, WORDS_ASKED, common_words, frequent_words
from .fit import NoCutError, TooShortError, fit
from .needles import needle_among_needles, needles
from .puzzle import FEWEST_WORDS, Material, Puzzle, materials
from .scoring import string_match_all, string_match_part
from .variables import variable_tracking

Subtask = Literal[
    "single", "multi_key", "among_needles", "multi_value", "multi_query", "variables", "common_words", "frequent_words"
]
SUBTASKS: tuple[Subtask, ...] = get_args(Subtask)
LONGEST = 2**21  # tokens of a prompt
FILLING = 2000  # characters of which the filling is cut
LONG = 4096  # tokens, from which common words are listed more often
OFTEN, RARELY = (30, 3), (6, 1)  # times that common and other words are listed
SENTENCE, ITEM = 56, 19  # bytes of an answer's sentence, and of the longest key, number or word with a comma
BETWEEN_ANSWERS = ", "


def count_bytes(text: str) -> int:
    """Return the number of bytes of a text."""
    return len(text.encode())


class Ruler:
    """Needles, variables and word counts in text of `num_tokens` tokens, with RULER's scoring.

    | subtask | RULER's name | the prompt |
    |---|---|---|
    | single | niah_single_2 | a key with a value, hidden in text |
    | multi_key | niah_multikey_1 | `num_keys` keys, one of which is asked for |
    | among_needles | niah_multikey_2 | a needle among others, without text |
    | multi_value | niah_multivalue | all `num_values` values of a key |
    | multi_query | niah_multiquery | the values of `num_queries` keys |
    | variables | vt | `num_chains` chains of `num_hops` + 1 variables: those with a certain value |
    | common_words | cwe | the ten most common words of a list |
    | frequent_words | fwe | the three most frequent words of a coded text |

    Examples cycle through the subtasks; the column `subtask` names the current one. As in Facts, the text consists of
    docstrings of the standard library or of a folder's files. Prompts have no worked examples.

    A prompt has exactly `num_tokens` tokens, including the chat template. TaskDataModule counts tokens with its own
    tokenizer; outside of it, each byte is a token (see `measure_with`).

    The answer is the expected strings, separated by commas. The reward is the share of them that a completion
    contains, ignoring case; an answer is right if it contains them all.

    Args:
        num_tokens: the number of tokens in a prompt.
        subtasks: the subtasks to use; None uses all.
        num_keys: the number of keys in multi_key.
        num_values: the number of values in multi_value.
        num_queries: the number of keys in multi_query, all of which are asked for.
        num_chains: the number of chains of variables, one of which is asked for.
        num_hops: the number of assignments from variable to variable in a chain.
        scoring: "all" rewards the share of strings found, "part" any of them.
        begin_answer: end the prompt with the beginning of an answer, for models that only continue text.
        path: a folder of text files; None reads the standard library of the running Python.
        pattern: glob pattern of the files to read.
        val_fraction: the fraction of files to hold out.
        seed: seeds the split and all examples.

    Raises:
        ValueError: a setting is invalid; at the first example or in `measure_with`, `num_tokens` is too small for a
            prompt.
    """

    def __init__(
        self,
        num_tokens: int = 1000,
        subtasks: list[Subtask] | None = None,
        num_keys: int = 4,
        num_values: int = 4,
        num_queries: int = 4,
        num_chains: int = 1,
        num_hops: int = 4,
        scoring: Literal["all", "part"] = "all",
        begin_answer: bool = False,
        path: str | None = None,
        pattern: str = "*.py",
        val_fraction: float = 0.05,
        seed: int = 0,
    ):
        self.subtasks = list(SUBTASKS if subtasks is None else subtasks)
        if not self.subtasks:
            raise ValueError(f"subtasks=[] is empty: choose from {', '.join(SUBTASKS)}")
        for subtask in self.subtasks:
            one_of(SUBTASKS, subtasks=subtask)
        at_least(1, LONGEST, num_tokens=num_tokens)
        counts = dict(num_keys=num_keys, num_values=num_values, num_queries=num_queries, num_chains=num_chains)
        at_least(1, FEWEST_WORDS, **counts)
        at_least(0, FEWEST_WORDS, num_hops=num_hops)
        at_least(0, seed=seed)
        one_of(("all", "part"), scoring=scoring)
        between_0_and_1(val_fraction=val_fraction)
        self.num_tokens, self.begin_answer, self.seed = num_tokens, begin_answer, seed
        self.num_keys, self.num_values, self.num_queries = num_keys, num_values, num_queries
        self.num_chains, self.num_hops = num_chains, num_hops
        self.score = string_match_all if scoring == "all" else string_match_part
        self.material = materials(path, pattern, val_fraction, seed)
        self.count: Callable[[str], int] = count_bytes

    def measure_with(self, count: Callable[[str], int]) -> None:
        """Set the function that counts a prompt's tokens.

        Raises:
            ValueError: `num_tokens` is too short for a subtask.
        """
        self.count = count
        rng = np.random.default_rng(self.seed)
        for subtask in self.subtasks:
            least = count("".join(self.parts(self.puzzle(subtask, self.material["train"], rng), 0))) + 1
            if least > self.num_tokens:
                raise ValueError(self._too_short(subtask, least))

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "subtask"}."""
        rng = example_generator(self.seed, split, index)
        subtask = self.subtasks[index % len(self.subtasks)]
        puzzle = self.puzzle(subtask, self.material[split], rng)
        filling = self.material[split].text(FILLING, rng)
        try:
            prompt = fit(partial(self.parts, puzzle), filling, self.num_tokens, self.count)
        except TooShortError as error:
            raise ValueError(self._too_short(subtask, error.least)) from error
        except NoCutError as error:
            raise ValueError(
                f"num_tokens={self.num_tokens}: cannot build a prompt of {subtask} with exactly this length: "
                "change num_tokens, or set path to other text"
            ) from error
        answer = BETWEEN_ANSWERS.join(puzzle.answers)
        return {"prompt": prompt, "answer": f" {answer}" if self.begin_answer else answer, "subtask": subtask}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return the share of the expected strings in each completion, or with scoring "part" 1 for any of them."""
        return [self.score(text, expected(right)) for text, right in zip(completions, answer, strict=True)]

    def is_right(self, completions: list[str], answers: list[str]) -> list[bool]:
        """Return True for each completion that contains all expected strings."""
        pairs = zip(completions, answers, strict=True)
        return [string_match_all(text, expected(right)) == 1 for text, right in pairs]

    @property
    def max_completion_length(self) -> int:
        """Return the tokens of the longest answer in a sentence, EOS included, with one token per byte."""
        items: dict[Subtask, int] = {
            "single": 2,
            "multi_key": 2,
            "among_needles": 2,
            "multi_value": 1 + self.num_values,
            "multi_query": 2 * self.num_queries,
            "variables": 2 + self.num_hops,
            "common_words": NUM_COMMON,
            "frequent_words": WORDS_ASKED,
        }
        return SENTENCE + ITEM * max(items[subtask] for subtask in self.subtasks) + END_OF_ANSWER

    def puzzle(self, subtask: Subtask, material: Material, rng: np.random.Generator) -> Puzzle:
        """Draw a puzzle of a subtask."""
        match subtask:
            case "single":
                return needles(material, rng)
            case "multi_key":
                return needles(material, rng, num_keys=self.num_keys)
            case "among_needles":
                return needle_among_needles(material, rng)
            case "multi_value":
                return needles(material, rng, num_values=self.num_values)
            case "multi_query":
                return needles(material, rng, num_keys=self.num_queries, num_asked=self.num_queries)
            case "variables":
                return variable_tracking(material, rng, self.num_chains, self.num_hops)
            case "common_words":
                return common_words(material, rng, *(OFTEN if self.num_tokens >= LONG else RARELY))
            case "frequent_words":
                return frequent_words(rng, self.num_tokens)

    def parts(self, puzzle: Puzzle, size: int) -> tuple[str, str]:
        """Return a prompt's text before and after the filling, for a context of about `size` characters."""
        end = f"\n{puzzle.beginning}" if self.begin_answer else ""
        return f"{puzzle.task}\n\n", f"\n{puzzle.context(size)}\n\n{puzzle.question}{end}"

    def _too_short(self, subtask: str, least: int) -> str:
        return (
            f"num_tokens={self.num_tokens} is too short for subtask {subtask}, which takes at least {least}: raise "
            "num_tokens or leave it out of subtasks"
        )


def expected(answer: str) -> list[str]:
    """Return the strings that a right completion contains."""
    return answer.strip().split(BETWEEN_ANSWERS)
