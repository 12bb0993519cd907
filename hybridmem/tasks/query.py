"""Search queries that find a standard library function's documentation from its one-line description.

Return True if the path is absolute.        answer  <answer>{"query": "return true the path absolute"}</answer>
"""

import ast
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybridmem.checks import at_least, between_0_and_1, number_held_out
from hybridmem.rl.rewards.ranking import RankingReward, write_answer
from hybridmem.rl.rewards.retrievers import BM25, terms

from .identifier import source_files
from .task import END_OF_ANSWER, Split, example_generator

WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")  # parts of CamelCase and snake_case
TESTS = {"test", "tests", "idle_test"}
BLOCKS = (ast.stmt, ast.excepthandler, ast.match_case)  # nodes that can contain a function


class Function(NamedTuple):
    """A function or method with a docstring."""

    name: str  # qualified, including the module
    description: str  # the docstring's first line
    rest: str  # the docstring's other lines


class Query:
    """A one-line description of a function; the response is a query, rewarded by the NDCG of BM25's results.

    The corpus has one document per function: the words of its name, and its docstring without the first line, which is
    the prompt. Functions with equal descriptions are equally relevant. Source is parsed and never run. Descriptions are
    held out, and validation goes through them in order; the corpus contains the documents of all functions.

    The answer, for supervised warm-up, is a query of randomly kept words of the description. It teaches the format and
    that words can be dropped; the reward teaches which words to drop.

    Needs bm25s (`pip install hybridmem[rank]`).

    Args:
        k: the cutoff of NDCG, in documents.
        reward_k: the cutoff of the reward's NDCG; None takes k. A larger cutoff also rewards progress at ranks below
            k, where NDCG@k would be zero for most groups.
        think: True if a response must contain <think>…</think> before its answer; the answers leave it empty.
        max_query_length: the maximum number of bytes in an answer's query; it also bounds max_completion_length.
        keep: the fraction of a description's words that an answer's query keeps.
        min_words: the minimum number of words in a description.
        every_line: also use the other lines of the training functions' docstrings as descriptions, which gives more
            text to learn reading and copying from.
        shuffle: shuffle the words of every other training example, which can then be copied but not guessed.
        path: a folder of .py files; None reads the standard library of the running Python without its tests.
        val_fraction: the fraction of descriptions to hold out.
        seed: seeds the split and all examples.

    Raises:
        ImportError: bm25s is not installed.
        ValueError: The settings leave no examples.
    """

    def __init__(
        self,
        k: int = 10,
        reward_k: int | None = None,
        think: bool = False,
        max_query_length: int = 64,
        keep: float = 0.8,
        min_words: int = 3,
        every_line: bool = False,
        shuffle: bool = False,
        path: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
    ):
        reward_k = k if reward_k is None else reward_k
        at_least(1, k=k, reward_k=reward_k, max_query_length=max_query_length, min_words=min_words)
        at_least(0, seed=seed)
        between_0_and_1(keep=keep, val_fraction=val_fraction)
        self.think, self.max_query_length, self.seed = think, max_query_length, seed
        self.keep, self.shuffle = keep, shuffle
        functions = documented_functions(path)
        documents = {function.name: f"{' '.join(words(function.name))}\n{function.rest}" for function in functions}
        self.ranking = RankingReward("ndcg", k, BM25.of(documents), think)
        self.rewarded = RankingReward("ndcg", reward_k, self.ranking.retriever, think)
        self.described: dict[str, list[str]] = {}  # functions by description
        for function in functions:
            if len(terms(function.description)) >= min_words:
                self.described.setdefault(function.description, []).append(function.name)
        self.descriptions = split_texts(sorted(self.described), val_fraction, seed)
        if every_line:
            self._describe_by_every_line(functions, min_words)

    def _describe_by_every_line(self, functions: list[Function], min_words: int) -> None:
        """Add the other docstring lines of the training functions, except those that describe another function."""
        learned = {name for description in self.descriptions["train"] for name in self.described[description]}
        lines: dict[str, list[str]] = {}
        for function in functions:
            if function.name in learned:
                for line in dict.fromkeys(map(str.strip, function.rest.splitlines())):
                    if len(terms(line)) >= min_words and line not in self.described:
                        lines.setdefault(line, []).append(function.name)
        self.described |= lines
        self.descriptions["train"] = [*self.descriptions["train"], *lines]

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "relevance": the names of the functions with this description}."""
        rng = example_generator(self.seed, split, index)
        descriptions = self.descriptions[split]
        description = descriptions[rng.integers(len(descriptions)) if split == "train" else index % len(descriptions)]
        text = description
        if self.shuffle and split == "train" and rng.random() < 0.5:
            text = " ".join(rng.permutation(description.split()))
        return {
            "prompt": f"{text}\n",
            "answer": write_answer(self.target(text, rng), "" if self.think else None),
            "relevance": self.described[description],
        }

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return Rec-R1's reward: 0.1 + NDCG@reward_k, 0 for queries that find nothing relevant, −2 if malformed."""
        rewards: Any = self.rewarded(completions, **columns)
        return rewards

    @property
    def max_completion_length(self) -> int:
        """Return the number of tokens in the longest answer, EOS included, with one token per byte."""
        return len(write_answer("", "" if self.think else None)) + self.max_query_length + END_OF_ANSWER

    def target(self, description: str, rng: np.random.Generator) -> str:
        """Return a query of randomly kept words of the description, at least one, up to max_query_length."""
        found = words(description)
        kept = [word for word, kept in zip(found, rng.random(len(found)) < self.keep, strict=True) if kept] or found
        query = ""
        for word in kept:
            longer = f"{query} {word}".strip()
            if len(longer) > self.max_query_length:
                break
            query = longer
        return query


@cache
def documented_functions(path: str | None) -> list[Function]:
    """Return the functions and methods in a folder's .py files that have a non-empty docstring, sorted by name."""
    root = Path(sysconfig.get_path("stdlib") if path is None else path)
    found: dict[str, Function] = {}
    for file in source_files(path):
        place = file.relative_to(root)
        if path is None and TESTS & set(place.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # templates and old dialects
            continue
        module = [part for part in place.with_suffix("").parts if part != "__init__"]
        found |= {function.name: function for function in _functions(tree, module)}
    if not found:
        raise ValueError(
            f"path={path!r} has no function with a docstring; set it to a folder with documented functions"
        )
    return [found[name] for name in sorted(found)]


def _functions(node: ast.AST, path: list[str]) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        inside = path
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = [*path, child.name]
            docstring = (ast.get_docstring(child) or "").strip()
            if docstring and not isinstance(child, ast.ClassDef):
                description, _, rest = docstring.partition("\n")
                yield Function(".".join(inside), description.strip(), rest.strip())
        if isinstance(child, BLOCKS):
            yield from _functions(child, inside)


def words(text: str) -> list[str]:
    """Return the lower-case words of a text, with identifiers split into words."""
    return [word.lower() for word in WORD.findall(text)]


def split_texts(texts: list[str], val_fraction: float, seed: int) -> dict[Split, list[str]]:
    """Split texts at random into training texts and a fraction of validation texts."""
    held_out = number_held_out(val_fraction, len(texts), "descriptions", "give more files")
    order = np.random.default_rng((seed,)).permutation(len(texts)).tolist()
    return {"train": [texts[i] for i in order[held_out:]], "val": [texts[i] for i in order[:held_out]]}
