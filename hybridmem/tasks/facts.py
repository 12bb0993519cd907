"""Key–value facts scattered through real text, with a question about one of them.

Return the canonical form of a path.
The access code of Lisbon is 4821.
Raise OSError if …

What is the access code of Lisbon?                    answer  The access code of Lisbon is 4821.
"""

import ast
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from hybridmem.checks import at_least, between_0_and_1
from hybridmem.files import files_below, read_file

from .identifier import split_files
from .task import END_OF_ANSWER, Split, exact_match, example_generator

CITIES = """
Lisbon Oslo Madrid Paris London Berlin Rome Vienna Athens Dublin Prague Warsaw Cairo Tokyo Delhi Moscow Boston Chicago
Denver Dallas Seattle Houston Atlanta Toronto Sydney Lima Havana Bogota Nairobi Jakarta Manila Seoul Hanoi Beijing
Tehran Baghdad Istanbul Geneva Zurich Milan Venice Florence Naples Munich Hamburg Cologne Brussels Amsterdam Stockholm
Helsinki Copenhagen Budapest Belgrade Sofia Kiev Riga Glasgow Manchester Liverpool Oxford Cambridge Montreal Vancouver
Melbourne
"""
KEYS = tuple(CITIES.split())
FACT = "The access code of {key} is {value}."
QUESTION = "What is the access code of {key}?"
SHORTEST_PARAGRAPH = 20  # characters; shorter paragraphs are headings and fragments


class Paragraphs:
    """Paragraphs of text files: the docstrings of .py files, and all of other files. Whole files are held out.

    Args:
        path: a folder of text files; None reads the standard library of the running Python.
        pattern: glob pattern of the files to read.
        val_fraction: the fraction of files to hold out.
        seed: seeds the split.
    """

    def __init__(self, path: str | None, pattern: str, val_fraction: float, seed: int):
        self.files = split_files(text_files(path, pattern), val_fraction, seed)
        self.read: dict[Path, list[str]] = {}

    def text(self, split: Split, room: int, rng: np.random.Generator) -> list[str]:
        """Return paragraphs that take `room` characters in total, with one newline after each."""
        pieces: list[str] = []
        order = rng.permutation(len(self.files[split])).tolist()
        while room > 0:
            before = room
            for number in order:
                found = self.of(self.files[split][number])
                start = int(rng.integers(len(found))) if found else 0
                for paragraph in found[start:]:
                    if room <= 0:
                        return pieces
                    left = room - len(paragraph) - 1
                    # Do not leave a single character, which could only hold a newline.
                    pieces.append(paragraph[:-1] if left == 1 else paragraph[: room - 1])
                    room -= len(pieces[-1]) + 1
            if room == before:
                raise ValueError(
                    f"the {split} files contain no paragraph of {SHORTEST_PARAGRAPH} characters; change path"
                )
        return pieces

    def of(self, file: Path) -> list[str]:
        """Return a file's paragraphs, each joined to one line; the file is read on first use."""
        if file not in self.read:
            text = read_file(file).decode("utf-8", "replace")
            parts = docstrings(text) if file.suffix == ".py" else [text]
            lines = [" ".join(paragraph.split()) for part in parts for paragraph in part.split("\n\n")]
            self.read[file] = [line for line in lines if len(line) >= SHORTEST_PARAGRAPH]
        return self.read[file]


class Facts:
    """Facts such as "The access code of Lisbon is 4821." between paragraphs of text, then a question about one.

    The answer is the fact, word for word, which is how instruct models answer naturally. Every fact
    is equally likely to be asked. Whole files are held out for validation. An example's text comes from one file, or
    from several if that file is too short: docstrings from .py files, and the full text of other files.

    The column `distance` is the number of characters from the end of the asked fact to the end of the prompt.

    Args:
        length: the number of characters in the prompt, question included. In the standard library's docstrings, a
            token of SmolLM2 has about four characters.
        num_facts: the number of facts in a prompt.
        digits: the number of digits in each value.
        path: a folder of text files; None reads the standard library of the running Python.
        pattern: glob pattern of the files to read.
        question_first: ask the question before the text as well.
        val_fraction: the fraction of files to hold out.
        seed: seeds the split and all examples.

    Raises:
        ValueError: The settings leave no room for text, or there are too few files.
    """

    def __init__(
        self,
        length: int = 1600,
        num_facts: int = 4,
        digits: int = 4,
        path: str | None = None,
        pattern: str = "*.py",
        question_first: bool = False,
        val_fraction: float = 0.05,
        seed: int = 0,
    ):
        at_least(1, length=length, digits=digits)
        at_least(1, len(KEYS), num_facts=num_facts)
        at_least(0, seed=seed)
        between_0_and_1(val_fraction=val_fraction)
        if num_facts > 9 * 10 ** (digits - 1):
            raise ValueError(f"digits={digits} gives too few values for num_facts={num_facts}; raise digits")
        self.length, self.num_facts, self.digits = length, num_facts, digits
        self.question_first, self.seed = question_first, seed
        longest = max(map(len, KEYS))
        needed = num_facts * (len(FACT) + longest + digits) + (1 + question_first) * (len(QUESTION) + longest)
        if length < needed:
            raise ValueError(
                f"length={length} is too short for num_facts={num_facts} and the question, which take up to {needed} "
                "characters; raise length or lower num_facts"
            )
        self.paragraphs = Paragraphs(path, pattern, val_fraction, seed)

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "distance" in characters}."""
        rng = example_generator(self.seed, split, index)
        keys = [KEYS[n] for n in rng.choice(len(KEYS), self.num_facts, replace=False)]
        first = 10 ** (self.digits - 1)
        values = [str(first + n) for n in rng.choice(9 * first, self.num_facts, replace=False)]
        asked = int(rng.integers(self.num_facts))
        question = QUESTION.format(key=keys[asked])
        facts = [FACT.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
        head = f"{question}\n\n" if self.question_first else ""
        room = self.length - sum(len(fact) + 1 for fact in facts) - len(head) - len(question) - 1
        pieces = self.paragraphs.text(split, room, rng)
        places = np.sort(rng.integers(0, len(pieces) + 1, self.num_facts)).tolist()
        for place, fact in reversed(list(zip(places, facts, strict=True))):
            pieces.insert(place, fact)
        prompt = head + "\n".join(pieces) + f"\n\n{question}"
        distance = len(prompt) - prompt.rindex(facts[asked]) - len(facts[asked])
        return {"prompt": prompt, "answer": facts[asked], "distance": distance}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return 1 for completions that equal the fact, up to surrounding white space, and 0 for others."""
        return exact_match([completion.strip() for completion in completions], answer)

    @property
    def max_completion_length(self) -> int:
        """Return the number of tokens in the longest fact, EOS included, with one token per byte."""
        return len(FACT.format(key=max(KEYS, key=len), value="")) + self.digits + END_OF_ANSWER


def text_files(path: str | None, pattern: str) -> list[Path]:
    """Return the non-empty files of a folder, or of the standard library for None, that match a pattern, sorted."""
    folder = Path(sysconfig.get_path("stdlib") if path is None else path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"path={path!r} is not a folder; set it to a folder with files that match pattern={pattern!r}"
        )
    files = [file for file in files_below(folder) if file.match(pattern) and file.stat().st_size]
    if not files:
        raise ValueError(f"path={path!r} has no file that matches pattern={pattern!r}; change one of them")
    return files


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a module in order, or an empty list if it cannot be parsed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in found if text]
