"""A folder of real source files, looked through turn by turn: which of them defines this function?

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
MARKS = 2  # bytes around what the environment says
LONGEST_CALL = len("submit a.py") + END_OF_ANSWER


class Folder(Files):
    """An environment by TRL's conventions: a real folder that is read with `ls` and `open`, until `submit`.

    Nothing is run and nothing is written; paths that lead out of the folder are refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done = False

    def reset(self, files: dict[str, str], answer: str, **columns: Any) -> None:
        """Write the files; `answer` is what has to be submitted."""
        self._write(files)
        self._answer, self._submitted, self.done = answer, "", False

    def get_reward(self) -> float:
        """1 for the right answer."""
        return float(self._submitted == self._answer)

    def submit(self, path: str) -> str:
        """Answer, and end.

        Args:
            path: the file that is asked for.
        """
        self._submitted, self.done = path.strip(), True
        return ""


class SearchableFolder(Folder):
    """A folder with `grep` as well: what takes a turn for every file takes one."""

    def grep(self, text: str) -> str:
        """Lines that hold a text, behind their file's name.

        Args:
            text: what to look for, letter by letter.
        """
        return self._lines_with(text)


class Workspace:
    """Which file of a folder defines a function of the standard library? Reward comes at the end, for the right one.

    The policy acts over turns (see PolicyModule's environment_factory, which this task brings): `ls`, `open FILE`,
    with `search` also `grep TEXT`, and `submit FILE`. Without `search` the answer takes as many turns as files have
    to be opened. The column `place` is the number of the right file; names of functions are held out.

    Examples have `turns` to learn from: what a patient reader does, file after file, and what it is told.

    Args:
        num_files: files of a folder, each with the first line of a function.
        search: whether there is `grep`.
        max_line_length: bytes of those lines.
        path: a folder of .py files; without one, the standard library of the running Python.
        val_fraction: share of the functions to hold out.
        seed: of the split and of all examples.

    Raises:
        ValueError: settings that leave no examples.
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
        held_out = number_held_out(val_fraction, len(functions), f"{len(functions)} functions", ", or give more files")
        names = np.random.default_rng((seed,)).permutation(sorted(functions)).tolist()
        self.names: dict[Split, list[str]] = {"train": names[held_out:], "val": names[:held_out]}
        if min(map(len, self.names.values())) < num_files:
            raise ValueError(
                f"max_line_length={max_line_length} leaves {len(functions)} functions, too few for num_files="
                f"{num_files} in training and validation: raise it, or give more files"
            )
        self.functions = functions
        self.longest_line = max(map(len, functions.values()))

    @property
    def environment(self) -> type[Folder]:
        """What makes a folder to act in."""
        return SearchableFolder if self.search else Folder

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """{"prompt", "answer", "files", "place", "turns"}."""
        rng = example_generator(self.seed, split, index)
        names = rng.choice(self.names[split], self.num_files, replace=False).tolist()
        place = int(rng.integers(self.num_files))
        files = {file: self.functions[name] for file, name in zip(NAMES, names, strict=False)}
        example = {"prompt": f"which file defines {names[place]}?\n", "answer": NAMES[place], "files": files}
        return {**example, "place": place, "turns": self.demonstration(example, names[place], place)}

    def demonstration(self, example: dict[str, Any], name: str, place: int) -> list[tuple[str, str]]:
        """What a patient reader says, and what the folder answers."""
        looks = [f"grep {name}("] if self.search else ["ls", *(f"open {file}" for file in NAMES[: place + 1])]
        folder = self.environment()
        folder.reset(**example)
        told = [act(folder, said, "plain", self.max_completion_length).observation for said in looks]
        return [*zip(looks, told, strict=True), (f"submit {example['answer']}", "")]

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """1 where the last call submits the answer; in an environment that is its own to say."""
        return [float(text.endswith(f"submit {right}")) for text, right in zip(completions, answer, strict=True)]

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest patient look through the folder and a call more, if each byte is a token."""
        line = self.longest_line + MARKS
        if self.search:  # a name is a part of its line
            looks = 2 * (len("grep ") + self.longest_line + END_OF_ANSWER + len("a.py:") + line)
        else:
            listing = len(" ".join(NAMES[: self.num_files])) + MARKS
            looks = LONGEST_CALL + listing + (self.num_files + 1) * (LONGEST_CALL + line)
        return looks + LONGEST_CALL


@cache
def functions_of(path: str | None) -> dict[str, str]:
    """The first lines of all functions of a folder that have one of a name, by it."""
    found: dict[str, str] = {}
    for file in source_files(path):
        for match in FUNCTION.finditer(file.read_bytes()):
            found.setdefault(match[1].decode(), match[0].decode())
    return found
