"""Bugs in self-contained functions: found by running, repaired with tools, and judged by tests."""

from pathlib import Path

import pytest

from hybridmem.rl.environments.tools import act, tools_of
from hybridmem.sandbox.calls import run_calls
from hybridmem.tasks import Repair, Task
from hybridmem.tasks.functions import EVERYTHING, alone, broken_functions, calls_to_try
from hybridmem.tasks.repair import CodeFolder
from tests.hybridmem.sandbox.isolation import needs_sandbox

pytestmark = needs_sandbox

# Ten self-contained functions, and some others.
SOURCE = '''
import os

CONSTANT = 3

def add(a, b):
    """Add."""
    return a + b

def shorten(text, size):
    return text[:size] if len(text) > size else text

def is_even(number):
    return number % 2 == 0

def clamp(value, low=0, high=10):
    # within bounds
    if value < low:
        return low
    if value > high:
        return high
    return value

def count(things, wanted):
    n = 0
    for thing in things:
        if thing == wanted:
            n += 1
    return n

def halve(number): return number // 2

def twice(thing): return thing * 2

def last(things): return things[len(things) - 1]

def largest(a, b): return a if a > b else b

def apart(a, b): return abs(a - b)

def forever(number):
    while number == number:
        number += 0

def global_one(a): return a + CONSTANT
def here(a): return os.path.join(os.getcwd(), a)
def reads(a): return open(a).read()
def nothing(): return 1
def makes(a):
    yield a
@staticmethod
def decorated(a): return a
'''


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("code")
    (folder / "code.py").write_text(SOURCE)
    return str(folder)


@pytest.fixture(scope="module")
def task(code) -> Repair:
    return Repair(path=code, val_fraction=0.3)


def begun(task, index=0, split="train") -> tuple[dict, CodeFolder]:
    example, folder = task.example(split, index), CodeFolder()
    folder.reset(**example)
    return example, folder


def test_only_functions_that_stand_alone_are_taken(code):
    names = {function.name for function in broken_functions(code)}
    assert {"add", "is_even", "clamp", "count", "halve", "last", "largest", "apart"} <= names
    assert not names & {"forever", "global_one", "here", "reads", "nothing", "makes", "decorated"}


def test_calls_are_always_the_same():
    source = "def f(a, b=1):\n    return a"
    assert calls_to_try(source) == calls_to_try(source)
    assert all(call.startswith("f(") and "," not in call.split("[")[0].split("'")[0] for call in calls_to_try(source))
    assert alone("def f(a): return eval(a)") is None
    assert alone("not code (") is None


def test_right_functions_pass_and_every_bug_fails(code):
    functions = broken_functions(code)
    programs = [([f.source, *(source for _, source, _ in f.bugs)], f.calls) for f in functions]
    for function, (right, *wrong) in zip(functions, run_calls(programs, limits=EVERYTHING), strict=True):
        assert right == list(function.results)
        assert wrong == [list(results) for _, _, results in function.bugs]
        assert all(results != right for results in wrong)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("num_files", [1, 3])
def test_the_demonstration_repairs_the_folder(code, split, num_files):
    task = Repair(path=code, num_files=num_files, val_fraction=0.4)
    assert isinstance(task, Task)
    for index in range(4):
        example, folder = begun(task, index, split)
        assert example["prompt"].strip() in folder.test()
        for said, heard in example["turns"]:
            assert folder.get_reward() == 0
            step = act(folder, said, "plain", task.max_completion_length)
            assert (step.observation, step.failures) == (heard, 0)
        assert step.ended
        assert folder.get_reward() == 1
        spoken = sum(len(said) + 1 + len(f"\n{heard}\n") for said, heard in example["turns"])
        assert spoken <= task.max_completion_length


def test_examples_follow_from_the_seed_and_functions_are_held_out(code, task):
    other, more = Repair(path=code, val_fraction=0.3), Repair(path=code, val_fraction=0.3, seed=1)
    assert [task.example("train", n) for n in range(9)] == [other.example("train", n) for n in range(9)]
    assert [task.example("train", n) for n in range(9)] != [more.example("train", n) for n in range(9)]
    seen = {split: {task.example(split, n)["function"] for n in range(40)} for split in ("train", "val")}
    assert not seen["train"] & seen["val"]
    assert len(seen["train"]) > 3


def test_only_some_kinds_of_bugs_and_lengths(code):
    task = Repair(path=code, kinds=["comparison"], max_length=100, val_fraction=0.5)
    examples = [task.example("train", n) for n in range(12)]
    assert {example["kind"] for example in examples} == {"comparison"}
    assert all(len(text) <= 100 for example in examples for text in example["files"].values())


def test_repairing_only_the_shown_calls_earns_nothing(task):
    example, folder = begun(task)
    answers = dict(map(tuple, example["shown"]))
    table = ", ".join(f"{call.partition('(')[2][:-1]!r}: {right}" for call, right in answers.items())
    cheat = f"def {example['function']}(*given): return {{{table}}}[', '.join(map(repr, given))]"
    folder._write({"a.py": cheat})
    assert folder.test() == f"all {len(answers)} calls are right"
    folder.submit()
    assert folder.get_reward() == 0


def test_repairs_without_submission_earn_nothing(task):
    example, folder = begun(task)
    for said, _ in example["turns"][:-1]:
        act(folder, said, "plain", 1000)
    assert folder.get_reward() == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("while True: pass", "does not end"),
        ("def", "raises SyntaxError"),
        ("import socket; socket.socket()", "raises PermissionError"),
        ("open('/etc/passwd')", "raises FileNotFoundError"),
        ("import os; os._exit(0)", "does not end"),
    ],
)
def test_code_of_the_policy_does_no_harm(text, said, task):
    _, folder = begun(task)
    folder._write({"a.py": text})
    assert said in folder.test()
    folder.submit()
    assert folder.get_reward() == 0


@pytest.mark.parametrize("turn", ["open {}", "edit {} 1 text"])
@pytest.mark.parametrize("path", ["../outside", "{outside}", "link", "a/../../outside", ".", "folder", "none.py"])
def test_no_path_leads_out(turn, path, task, tmp_path):
    _, folder = begun(task)
    outside = folder._root.parent / "outside"
    outside.write_text("as it was\n")
    (folder._root / "link").symlink_to(outside)
    (folder._root / "folder").mkdir()
    try:
        step = act(folder, turn.format(path.format(outside=outside)), "plain", 1000)
        assert step.failures == 1
        assert "outside the folder" in step.observation or "does not exist" in step.observation
        assert outside.read_text() == "as it was\n"
    finally:
        outside.unlink()


def test_tools_read_and_change(task):
    _, folder = begun(task)
    folder._write({"a.py": "one\ntwo\nthree\n", "b.py": "two and more\n"})
    assert folder.ls() == "a.py b.py"
    assert folder.grep("two") == "a.py:two\nb.py:two and more"
    assert folder.open("a.py") == "1 one\n2 two\n3 three"
    assert act(folder, "edit a.py 2     2 a\n    2 b", "plain", 100).observation == "edited"
    assert folder.open("a.py") == "1 one\n2     2 a\n3     2 b\n4 three"
    assert "lines 1 to 4, but line is 5" in act(folder, "edit a.py 5 x", "plain", 100).observation
    assert "line='x' is no" in act(folder, "edit a.py x y", "plain", 100).observation
    assert len(act(folder, "open a.py", "plain", 10).observation) < 45
    assert set(tools_of(folder)) == {"ls", "grep", "open", "edit", "test", "submit"}


def test_its_folder_goes_with_it(task):
    _, folder = begun(task)
    root = Path(folder._root)
    assert root.is_dir()
    del folder
    assert not root.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_files": 40}, "num_files=40 must be at most 26"),
        ({"num_files": 9, "val_fraction": 0.3}, "too few for num_files=9"),
        ({"num_shown": 16}, "num_shown=16 must be below 16"),
        ({"kinds": ["typo"]}, "kinds must be one of operator, comparison, constant, condition, not 'typo'"),
        ({"max_length": 10}, "leave 0 functions with bugs; raise max_length"),
    ],
)
def test_settings_that_leave_nothing(settings, said, code):
    with pytest.raises(ValueError, match=said):
        Repair(path=code, **settings)
