"""Repair of a small bug in a folder of real source code, with tests.

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

MOST_TOLD = 3  # wrong calls that `test` shows
LONGEST_RESULT = 100  # characters of a result that `test` shows
Call = list[str]  # a call's source and the repr of its result


class CodeFolder(Files):
    """Environment with TRL's interface: a folder of code to read, edit and test until `submit`.

    Code runs only in a sandbox (hybridmem.sandbox.run), on a copy of the folder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done = False

    def reset(self, files: dict[str, str], path: str, shown: list[Call], hidden: list[Call], **columns: Any) -> None:
        """Write the files.

        Args:
            files: the files' texts by name.
            path: the file whose functions are called.
            shown: the calls that `test` checks.
            hidden: further calls that the reward checks.
            columns: further columns of the example, ignored.
        """
        self._write(files)
        self._path, self._shown, self._hidden, self.done = path, shown, hidden, False

    def get_reward(self) -> float:
        """Return 1 if the folder was submitted and all shown and hidden calls return the right results, else 0."""
        calls = [*self._shown, *self._hidden]
        return float(self.done and self._results(calls) == [right for _, right in calls])

    def grep(self, text: str) -> str:
        """Return the lines that contain a text, each after its file's name.

        Args:
            text: the literal text to search for.
        """
        return self._lines_with(text)

    def open(self, path: str) -> str:
        """Return the numbered lines of a file.

        Args:
            path: the file's name.
        """
        lines = super().open(path).splitlines()
        return "\n".join(f"{number} {line}" for number, line in enumerate(lines, 1))

    def edit(self, path: str, line: int, text: str = "") -> str:
        """Replace a line of a file.

        Args:
            path: the file's name.
            line: the line's number, as shown by `open`.
            text: the new text with its indentation; an empty text deletes the line.
        """
        file = self._file(path)
        file.write_text(with_line(path, file.read_text().splitlines(), line, text))
        return "edited"

    def test(self) -> str:
        """Run the shown calls and report those with wrong results."""
        return told(self._shown, self._results(self._shown))

    def submit(self) -> str:
        """Submit the folder and end the episode."""
        self.done = True
        return ""

    def _results(self, calls: list[Call]) -> list[str]:
        files = {path.name: path.read_text() for path in self._root.iterdir()}
        return list(results_of(tuple(sorted(files.items())), self._path, tuple(call for call, _ in calls)))


class Repair:
    """A bug in a function of the standard library, to be located and repaired; tests give the final reward.

    The policy acts over several turns (the task provides PolicyModule's environment_factory): `ls`, `grep TEXT`,
    `open FILE`, `edit FILE LINE TEXT`, `test`, `submit`. The prompt contains a call with a wrong result. The right
    results come from running the original function. All code runs in a sandbox, which the task requires.

    The simplest setting is one file with one short function and one kind of bug; longer functions, more files and more
    kinds are harder. The columns are the bug's `kind`, `function`, `files`, the `path` of the file with the bug, and
    the `shown` and `hidden` calls. Functions are held out by name.

    Examples have `turns` as demonstrations: open the file, edit the line, test, submit.

    Args:
        num_files: the number of files in a folder, each with one function; one function has a bug.
        max_length: the maximum number of characters in a function.
        kinds: kinds of bugs among operator, comparison, constant and condition; None takes all.
        num_shown: the number of calls that `test` checks; the reward checks more.
        path: a folder of .py files; None reads the standard library of the running Python.
        val_fraction: the fraction of functions to hold out.
        seed: seeds the split and all examples.

    Raises:
        ValueError: The settings leave no examples.
        SandboxError: The system cannot run code in isolation; the message contains the missing feature.
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
            raise ValueError(
                f"num_shown={num_shown} must be below {MOST_CALLS}, because the reward needs further calls"
            )
        between_0_and_1(val_fraction=val_fraction)
        for kind in kinds or []:
            one_of(KINDS, kinds=kind)
        self.num_files, self.max_length, self.num_shown, self.seed = num_files, max_length, num_shown, seed
        fitting = [with_bugs(function, kinds, max_length) for function in broken_functions(path, max_length)]
        self.functions = {function.name: function for function in fitting if function.bugs}
        number = len(self.functions)
        if number < 2:
            raise ValueError(
                f"max_length={max_length} and kinds={kinds} leave {number} functions with bugs; raise max_length, "
                "allow more kinds, or set path to more files"
            )
        held_out = number_held_out(val_fraction, number, "functions", "give more files")
        names = np.random.default_rng((seed,)).permutation(sorted(self.functions)).tolist()
        self.names: dict[Split, list[str]] = {"train": names[held_out:], "val": names[:held_out]}
        if min(map(len, self.names.values())) < num_files:
            raise ValueError(
                f"max_length={max_length} leaves {number} functions, too few for num_files={num_files} in training "
                "and validation; raise max_length or val_fraction, or set path to more files"
            )

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "files", "path", "shown", "hidden", "function", "kind", "turns"}."""
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
        """Return the turns (action, observation) of a perfect repair; the output of `test` needs no run."""
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
        """Return the environments' rewards: 1 if all tests pass, else 0."""
        return [environment.get_reward() for environment in columns["environments"]]

    @property
    def max_completion_length(self) -> int:
        """Return the tokens of the longest demonstration plus a failed test and an edit, with one token per byte."""
        turn, longest = END_OF_ANSWER + MARKS, len("edit a.py 99 ") + self.max_length
        find = len("grep def (") + len("a.py:") + 2 * self.max_length + turn if self.num_files > 1 else 0
        numbers = len("99 ") * self.max_length // len("def f(a):")  # in front of every line
        read = len("open a.py") + self.max_length + numbers + turn
        change = longest + len("edited") + turn
        wrong = MOST_TOLD * (self.max_length + LONGEST_REPR + LONGEST_RESULT)
        tests = 2 * (len("test") + len(f"all {self.num_shown} calls are right") + turn) + wrong
        return find + read + 2 * change + tests + len("submit") + turn


def with_bugs(function: BrokenFunction, kinds: list[str] | None, max_length: int) -> BrokenFunction:
    """Return a function with only the bugs of the given kinds and length."""
    bugs = [bug for bug in function.bugs if (kinds is None or bug[0] in kinds) and len(bug[1]) <= max_length]
    return function._replace(bugs=tuple(bugs))


def told(calls: list[Call], results: list[str]) -> str:
    """Return the output of `test`."""
    pairs = zip(calls, results, strict=True)
    wrong = [told_of(call, right, result) for (call, right), result in pairs if result != right]
    if not wrong:
        return f"all {len(calls)} calls are right"
    return "\n".join([f"{len(wrong)} of {len(calls)} calls are wrong", *wrong[:MOST_TOLD]])


def told_of(call: str, right: str, result: str) -> str:
    """Describe a wrong call by its result and the right one."""
    given = result if result.startswith(("raises ", "does not end")) else f"gives {result}"
    return f"{call} {given[:LONGEST_RESULT]}, not {right}"
