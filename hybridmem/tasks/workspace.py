"""Multi-turn search in a folder of real source files for the file that defines a function.

which file defines getatime?            ls
a.py b.py c.py d.py                     open a.py
def commonprefix(m):                    open b.py
def getatime(filename):                 submit b.py
"""

import re
from functools import cache
from typing import Any

import numpy as np

from hybridmem.checks import at_least, between_0_and_1, number_held_out
from hybridmem.rl.environments.folders import Files
from hybridmem.rl.environments.tools import act

from .identifier import source_files
from .task import END_OF_ANSWER, Split, example_generator

FUNCTION = re.compile(rb"^def ([a-z]\w*)\([\w, =*.]*\):$", re.MULTILINE)
NAMES = [f"{letter}.py" for letter in "abcdefghijklmnopqrstuvwxyz"]
MARKS = 2  # bytes around an observation
LONGEST_CALL = len("submit a.py") + END_OF_ANSWER


class Folder(Files):
    """Environment with TRL's interface: a folder to read with `ls` and `open` until `submit`.

    Tools run no code, write no files and reject paths outside the folder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done = False

    def reset(self, files: dict[str, str], answer: str, **columns: Any) -> None:
        """Write the files; `answer` is the right submission."""
        self._write(files)
        self._answer, self._submitted, self.done = answer, "", False

    def get_reward(self) -> float:
        """Return 1 for the right submission, else 0."""
        return float(self._submitted == self._answer)

    def submit(self, path: str) -> str:
        """Submit the answer and end the episode.

        Args:
            path: the file that answers the question.
        """
        self._submitted, self.done = path.strip(), True
        return ""


class SearchableFolder(Folder):
    """Folder with an additional `grep`, which searches all files in one turn."""

    def grep(self, text: str) -> str:
        """Return the lines that contain a text, each after its file's name.

        Args:
            text: the literal text to search for.
        """
        return self._lines_with(text)


class Workspace:
    """A search for the file that defines a function of the standard library, with a final reward for the right file.

    The policy acts over several turns (the task provides PolicyModule's environment_factory): `ls`, `open FILE`,
    `grep TEXT` if `search` is set, and `submit FILE`. Without `search`, the policy must open files one by one. The
    column `place` is the index of the right file. Function names are held out.

    Examples have `turns` as demonstrations, which open file after file until the function is found.

    Args:
        num_files: the number of files in a folder, each with the first line of a function.
        search: provide `grep`.
        max_line_length: the maximum number of bytes in those lines.
        path: a folder of .py files; None reads the standard library of the running Python.
        val_fraction: the fraction of functions to hold out.
        seed: seeds the split and all examples.

    Raises:
        ValueError: The settings leave no examples.
    """

    def __init__(
        self,
        num_files: int = 4,
        search: bool = False,
        max_line_length: int = 40,
        path: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
    ):
        at_least(2, num_files=num_files)
        at_least(1, max_line_length=max_line_length)
        at_least(0, seed=seed)
        if num_files > len(NAMES):
            raise ValueError(f"num_files={num_files} must be at most {len(NAMES)}")
        between_0_and_1(val_fraction=val_fraction)
        self.num_files, self.search, self.seed = num_files, search, seed
        functions = {name: line for name, line in functions_of(path).items() if len(line) <= max_line_length}
        held_out = number_held_out(val_fraction, len(functions), "functions", "give more files")
        names = np.random.default_rng((seed,)).permutation(sorted(functions)).tolist()
        self.names: dict[Split, list[str]] = {"train": names[held_out:], "val": names[:held_out]}
        if min(map(len, self.names.values())) < num_files:
            raise ValueError(
                f"max_line_length={max_line_length} leaves {len(functions)} functions, too few for num_files="
                f"{num_files} in training and validation; raise max_line_length or set path to more files"
            )
        self.functions = functions
        self.longest_line = max(map(len, functions.values()))

    @property
    def environment(self) -> type[Folder]:
        """Return the environment class."""
        return SearchableFolder if self.search else Folder

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "files", "place", "turns"}."""
        rng = example_generator(self.seed, split, index)
        names = rng.choice(self.names[split], self.num_files, replace=False).tolist()
        place = int(rng.integers(self.num_files))
        files = {file: self.functions[name] for file, name in zip(NAMES, names, strict=False)}
        example = {"prompt": f"which file defines {names[place]}?\n", "answer": NAMES[place], "files": files}
        return {**example, "place": place, "turns": self.demonstration(example, names[place], place)}

    def demonstration(self, example: dict[str, Any], name: str, place: int) -> list[tuple[str, str]]:
        """Return the turns (action, observation) of a successful search."""
        looks = [f"grep {name}("] if self.search else ["ls", *(f"open {file}" for file in NAMES[: place + 1])]
        folder = self.environment()
        folder.reset(**example)
        told = [act(folder, said, "plain", self.max_completion_length).observation for said in looks]
        return [*zip(looks, told, strict=True), (f"submit {example['answer']}", "")]

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return 1 for completions that end by submitting the answer; in environments, `get_reward` decides instead."""
        return [float(text.endswith(f"submit {right}")) for text, right in zip(completions, answer, strict=True)]

    @property
    def max_completion_length(self) -> int:
        """Return the tokens of the longest demonstration plus one call, with one token per byte."""
        line = self.longest_line + MARKS
        if self.search:  # a name is shorter than its line
            looks = 2 * (len("grep ") + self.longest_line + END_OF_ANSWER + len("a.py:") + line)
        else:
            listing = len(" ".join(NAMES[: self.num_files])) + MARKS
            looks = LONGEST_CALL + listing + (self.num_files + 1) * (LONGEST_CALL + line)
        return looks + LONGEST_CALL


@cache
def functions_of(path: str | None) -> dict[str, str]:
    """Return the first lines of a folder's top-level functions by name."""
    found: dict[str, str] = {}
    for file in source_files(path):
        for match in FUNCTION.finditer(file.read_bytes()):
            found.setdefault(match[1].decode(), match[0].decode())
    return found
