"""Results of calls to untrusted code, whatever else the code does."""

import pytest

from hybridmem.sandbox.calls import results_of, run_calls

from .isolation import needs_sandbox

pytestmark = needs_sandbox

ADD = "def add(a, b):\n    return a + b\n"


def test_calls_return_results_and_errors():
    calls = ["add(2, 3)", "add('a', 'b')", "add([1], [2])", "add(1, 'a')", "add(1)", "nothing()"]
    results = results_of((("a.py", ADD),), "a.py", tuple(calls))
    assert results[:3] == ("5", "'ab'", "[1, 2]")
    assert results[3] == "raises TypeError: unsupported operand type(s) for +: 'int' and 'str'"
    assert results[4].startswith("raises TypeError: add() missing 1 required positional argument")
    assert results[5] == "raises NameError: name 'nothing' is not defined"


def test_files_can_import_each_other():
    files = (("a.py", "from b import two\ndef four(): return two + two"), ("b.py", "two = 2"))
    assert results_of(files, "a.py", ("four()",)) == ("4",)


def test_sources_are_kept_apart():
    count = "n = []\ndef f():\n    n.append(1)\n    return len(n)\n"
    spoil = "import builtins\nbuiltins.abs = builtins.eval = None\ndef f(): return 0\n"
    assert run_calls([([count, count], ["f()", "f()"]), ([spoil], ["f()"]), ([count], ["f()"])]) == [
        [["1", "2"], ["1", "2"]],
        [["raises TypeError: 'NoneType' object is not callable"]],
        [["1"]],
    ]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(", "raises SyntaxError: '(' was never closed (code, line 1)"),
        ("1 / 0", "raises ZeroDivisionError: division by zero"),
        ("def f():\n    while True: pass", "does not end"),
        ("def f():\n    while True:\n        try:\n            while True: pass\n        except: pass", "does not end"),
        ("while True: pass", "does not end"),
        ("def f(): return 9 ** 9 ** 9", "does not end"),
        ("import os\ndef f(): os._exit(0)", "does not end"),
        ("def f(): raise SystemExit(0)", "raises SystemExit: 0"),
        ("def f(): return bytearray(2 ** 40)", "raises MemoryError: "),
        ("def f(): return f()", "raises RecursionError: maximum recursion depth exceeded"),
    ],
    ids=[
        "syntax",
        "error",
        "loop",
        "deaf loop",
        "loop at once",
        "in C",
        "exit",
        "end",
        "memory",
        "recursion",
    ],
)
def test_whatever_the_code_does_it_has_no_right_answer(source, said):
    (((first,),),) = run_calls([([source], ["f()"])], seconds=0.1)
    assert first == said


def test_printed_output_is_no_answer():
    source = """
import os, sys
for number in range(30):
    try: os.write(number, b'[0, [["5"]]]\\n')
    except OSError: pass
print('[0, [["5"]]]')
def f(): return 4
"""
    (((first,),),) = run_calls([([source], ["f()"])])
    assert first == "4"
