"""A folder of real source with one small bug, and tests: find it, put it right.

add(2, 3) gives -1, not 5               open a.py
1 def add(a, b):
2     return a - b                      edit a.py 2     return a + b
edited                                  test
all 4 calls are right                   submit
"""

from typing import Any

import numpy as np

from hybridmem.checks import at_least, between_0_and_1, number_held_out, one_of
from hybridmem.rl.environments.folders import Files, with_line
from hybridmem.rl.environments.tools import act
from hybridmem.sandbox.calls import results_of

from .bugs import KINDS
from .functions import LONGEST_REPR, MOST_CALLS, BrokenFunction, broken_functions
from .task import END_OF_ANSWER, Split, example_generator
from .workspace import MARKS, NAMES

MOST_TOLD = 3  # calls that are wrong
LONGEST_RESULT = 100  # characters of what a test tells of a call
Call = list[str]  # a call as Python writes it, and what it returns, as a repr


class CodeFolder(Files):
    """An environment by TRL's conventions: a real folder of code that is read, changed and tested, until `submit`.

    Code runs in a sandbox alone (hybridmem.sandbox.run), on a copy of the folder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done = False

    def reset(self, files: dict[str, str], path: str, shown: list[Call], hidden: list[Call], **columns: Any) -> None:
        """Write the files.

        Args:
            files: their texts by name.
            path: the file whose functions are called.
            shown: what `test` looks at.
            hidden: what the reward asks for as well.
            columns: of the example, ignored.
        """
        self._write(files)
        self._path, self._shown, self._hidden, self.done = path, shown, hidden, False

    def get_reward(self) -> float:
        """1 if the folder was submitted and every call returns what it should, those that `test` does not show too."""
        calls = [*self._shown, *self._hidden]
        return float(self.done and self._results(calls) == [right for _, right in calls])

    def grep(self, text: str) -> str:
        """Lines that hold a text, behind their file's name.

        Args:
            text: what to look for, letter by letter.
        """
        return self._lines_with(text)

    def open(self, path: str) -> str:
        """What a file holds, its lines numbered.

        Args:
            path: its name.
        """
        lines = super().open(path).splitlines()
        return "\n".join(f"{number} {line}" for number, line in enumerate(lines, 1))

    def edit(self, path: str, line: int, text: str = "") -> str:
        """Put a text in the place of a line.

        Args:
            path: the file's name.
            line: the line's number, as `open` tells it.
            text: what stands there from now on, with its indentation; nothing takes the line away.
        """
        file = self._file(path)
        file.write_text(with_line(path, file.read_text().splitlines(), line, text))
        return "edited"

    def test(self) -> str:
        """Make the calls that are to come out right; tells of those that do not."""
        return told(self._shown, self._results(self._shown))

    def submit(self) -> str:
        """Hand in the folder as it is, and end."""
        self.done = True
        return ""

    def _results(self, calls: list[Call]) -> list[str]:
        files = {path.name: path.read_text() for path in self._root.iterdir()}
        return list(results_of(tuple(sorted(files.items())), self._path, tuple(call for call, _ in calls)))


class Repair:
    """A bug in a function of the standard library, to be found and put right. Reward comes at the end, by tests.

    The policy acts over turns (see PolicyModule's environment_factory, which this task brings): `ls`, `grep TEXT`,
    `open FILE`, `edit FILE LINE TEXT`, `test`, `submit`. The prompt tells a call that comes out wrong. What calls
    return is found by running the function as it was; code runs in a sandbox, without which there is no such task.

    Simplest is a file of one short function with one kind of bug; longer functions, more files and kinds make it
    harder. Columns: `kind` of the bug, `function`, `files`, `path` of the right one, calls that `test` shows and
    hidden ones. Functions are held out, by name.

    Examples have `turns` to learn from: open the file, edit the line, test, submit.

    Args:
        num_files: files of a folder, each with a function; one has a bug.
        max_length: characters of a function.
        kinds: of bugs: operator, comparison, constant, condition. None: all.
        num_shown: calls that `test` makes; the reward asks for more.
        path: a folder of .py files; without one, the standard library of the running Python.
        val_fraction: share of the functions to hold out.
        seed: of the split and of all examples.

    Raises:
        ValueError: settings that leave no examples.
        SandboxError: the system cannot run code in isolation; it says what is missing.
    """

    environment = CodeFolder

    def __init__(
        self,
        num_files: int = 1,
        max_length: int = 120,
        kinds: list[str] | None = None,
        num_shown: int = 4,
        path: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
    ):
        at_least(1, num_files=num_files, max_length=max_length, num_shown=num_shown)
        at_least(0, seed=seed)
        if num_files > len(NAMES):
            raise ValueError(f"num_files={num_files} must be at most {len(NAMES)}")
        if num_shown >= MOST_CALLS:
            raise ValueError(f"num_shown={num_shown} must be below {MOST_CALLS}: the reward asks for others too")
        between_0_and_1(val_fraction=val_fraction)
        for kind in kinds or []:
            one_of(KINDS, kinds=kind)
        self.num_files, self.max_length, self.num_shown, self.seed = num_files, max_length, num_shown, seed
        fitting = [with_bugs(function, kinds, max_length) for function in broken_functions(path, max_length)]
        self.functions = {function.name: function for function in fitting if function.bugs}
        number = len(self.functions)
        if number < 2:
            raise ValueError(
                f"max_length={max_length} and kinds={kinds} leave {number} functions with bugs: raise max_length, "
                "allow more kinds, or give more files"
            )
        held_out = number_held_out(val_fraction, number, f"{number} functions", ", or give more files")
        names = np.random.default_rng((seed,)).permutation(sorted(self.functions)).tolist()
        self.names: dict[Split, list[str]] = {"train": names[held_out:], "val": names[:held_out]}
        if min(map(len, self.names.values())) < num_files:
            raise ValueError(
                f"max_length={max_length} leaves {number} functions, too few for num_files={num_files} in training "
                "and validation: raise it, or val_fraction, or give more files"
            )

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """{"prompt", "answer", "files", "path", "shown", "hidden", "function", "kind", "turns"}."""
        rng = example_generator(self.seed, split, index)
        names = rng.choice(self.names[split], self.num_files, replace=False).tolist()
        place = int(rng.integers(self.num_files))
        function = self.functions[names[place]]
        kind, buggy, wrong = function.bugs[rng.integers(len(function.bugs))]
        order = rng.permutation(len(function.calls)).tolist()
        first = next(number for number in order if function.results[number] != wrong[number])
        order.remove(first)
        tests = [[function.calls[number], function.results[number]] for number in [first, *order]]
        sources = [self.functions[name].source for name in names]
        files = dict(zip(NAMES, [*sources[:place], buggy, *sources[place + 1 :]], strict=False))
        example = {
            "prompt": f"{told_of(function.calls[first], function.results[first], wrong[first])}\n",
            "answer": "submit",
            "files": files,
            "path": NAMES[place],
            "shown": tests[: self.num_shown],
            "hidden": tests[self.num_shown :],
            "function": function.name,
            "kind": kind,
        }
        return {**example, "turns": self.demonstration(example, function.source)}

    def demonstration(self, example: dict[str, Any], right: str) -> list[tuple[str, str]]:
        """What one says who sees the bug at once, and what the folder answers; what `test` says is known."""
        path, shown = example["path"], example["shown"]
        lines = enumerate(zip(example["files"][path].splitlines(), right.splitlines(), strict=True), 1)
        number, text = next((number, line) for number, (buggy, line) in lines if buggy != line)
        looks = [f"open {path}", f"edit {path} {number} {text}"]
        if self.num_files > 1:
            looks = [f"grep def {example['function']}(", *looks]
        folder = self.environment()
        folder.reset(**example)
        heard = [act(folder, said, "plain", self.max_completion_length).observation for said in looks]
        passed = told(shown, [result for _, result in shown])
        return [*zip(looks, heard, strict=True), ("test", passed), ("submit", "")]

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """What the folders say: 1 where every test passes."""
        return [environment.get_reward() for environment in columns["environments"]]

    @property
    def max_completion_length(self) -> int:
        """Tokens of the demonstration's longest form, a failed test and an edit more, if each byte is a token."""
        turn, longest = END_OF_ANSWER + MARKS, len("edit a.py 99 ") + self.max_length
        find = len("grep def (") + len("a.py:") + 2 * self.max_length + turn if self.num_files > 1 else 0
        numbers = len("99 ") * self.max_length // len("def f(a):")  # in front of every line
        read = len("open a.py") + self.max_length + numbers + turn
        change = longest + len("edited") + turn
        wrong = MOST_TOLD * (self.max_length + LONGEST_REPR + LONGEST_RESULT)
        tests = 2 * (len("test") + len(f"all {self.num_shown} calls are right") + turn) + wrong
        return find + read + 2 * change + tests + len("submit") + turn


def with_bugs(function: BrokenFunction, kinds: list[str] | None, max_length: int) -> BrokenFunction:
    """A function with those of its bugs that are of some kinds, in few enough characters."""
    bugs = [bug for bug in function.bugs if (kinds is None or bug[0] in kinds) and len(bug[1]) <= max_length]
    return function._replace(bugs=tuple(bugs))


def told(calls: list[Call], results: list[str]) -> str:
    """What a test says."""
    wrong = [
        told_of(call, right, result)
        for (call, right), result in zip(calls, results, strict=True)
        if result != right
    ]  # fmt: skip
    if not wrong:
        return f"all {len(calls)} calls are right"
    return "\n".join([f"{len(wrong)} of {len(calls)} calls are wrong", *wrong[:MOST_TOLD]])


def told_of(call: str, right: str, result: str) -> str:
    """What came of a call, and what should have."""
    given = result if result.startswith(("raises ", "does not end")) else f"gives {result}"
    return f"{call} {given[:LONGEST_RESULT]}, not {right}"
