"""Generated bugs, each a single change in a single line."""

import ast

import pytest

from hybridmem.tasks.bugs import bugs_of


@pytest.mark.parametrize(
    ("line", "kind", "bugs"),
    [
        ("return a + b", "operator", {"return a - b"}),
        ("return a < b", "comparison", {"return a <= b", "return a >= b"}),
        ("return a not in b", "comparison", {"return a in b"}),
        ("return a < b == c", "comparison", {"return a <= b == c", "return a >= b == c", "return a < b != c"}),
        ("return a[1:]", "constant", {"return a[2:]", "return a[0:]"}),
        ("return True", "constant", {"return False"}),
        ("return a and b", "condition", {"return a or b"}),
        ("return a if not b else c", "condition", {"return a if b else c"}),
        ("a += b", "operator", {"a -= b"}),
        ("return a", "operator", set()),
    ],
)
def test_every_bug_is_one_thing_that_is_other(line, kind, bugs):
    source = f"def f(a, b, c):\n    {line}"
    found = [bug for bug in bugs_of(source) if bug.kind == kind]
    assert {bug.source.splitlines()[1].strip() for bug in found} == bugs
    assert all(bug.source.splitlines()[0] == source.splitlines()[0] for bug in found)


def test_bugs_are_code_and_differ():
    source = ast.unparse(
        ast.parse("def f(a, b):\n    while b > 0 and a:\n        a, b = (b - 1, a % b)\n    return a == 3")
    )
    sources = [bug.source for bug in bugs_of(source)]
    assert len(sources) == len(set(sources)) > 8
    assert source not in sources
    for bug in sources:
        ast.parse(bug)
