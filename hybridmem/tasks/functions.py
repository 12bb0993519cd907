"""Self-contained functions from real source code, with calls, results, and bugs that change the results."""

import ast
import builtins
import re
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import product, zip_longest
from typing import NamedTuple

import numpy as np

from hybridmem.sandbox.calls import RAISED, UNFINISHED, run_calls
from hybridmem.sandbox.run import Limits

from .bugs import bugs_of
from .identifier import source_files
from .query import TESTS

DEFINITION = re.compile(r"^def \w+\(.*?(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
LONGEST_SOURCE = 3000  # characters, with docstring and comments
LONGEST_REPR = 32  # characters of a result's repr
MOST_CALLS, FEWEST_CALLS, FEWEST_RESULTS = 16, 6, 2
# Builtins that read or change state beyond their arguments.
OUTSIDE = """
__import__ breakpoint compile delattr dir eval exec exit globals help id input locals memoryview object open print quit
setattr super vars
"""
BUILTINS = set(dir(builtins)) - set(OUTSIDE.split())
EFFECTS = (ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal, ast.Yield, ast.YieldFrom, ast.Await)
VALUES: dict[str, list[str]] = {
    "int": ["0", "1", "2", "3", "5", "7", "12", "100", "255", "1024", "-1", "-4"],
    "float": ["0.0", "0.5", "2.5", "-1.5"],
    "str": ["''", "'a'", "'abc'", "'a b'", "'x=1'", "'/a/b.py'", "'A_b'", "' c '"],
    "bytes": ["b''", "b'abc'", r"b'\x01\x02\x03\x04'"],
    "list": ["[]", "[3]", "[1, 2, 3]", "[5, 2, 4]", "['a', 'b']"],
}
SECONDS = 0.1  # CPU time for all calls of one source; functions that terminate need far less
TRIED = (12, 6, 2)  # argument lists per combination of types, for one, two and three arguments
EVERYTHING = Limits(seconds=300.0, memory=2**30, output=2**26, disk=2**26)


class BrokenFunction(NamedTuple):
    """A function, calls with their results, and bugs as (kind, source, results of the same calls)."""

    name: str
    source: str
    calls: tuple[str, ...]
    results: tuple[str, ...]
    bugs: tuple[tuple[str, str, tuple[str, ...]], ...]


@cache
def broken_functions(path: str | None, max_length: int = LONGEST_SOURCE) -> tuple[BrokenFunction, ...]:
    """Return the self-contained functions of a folder, each with the bugs that change the result of a call.

    Functions and bugs run in a sandbox only. Those that do not terminate are excluded.

    Args:
        path: a folder of .py files; None reads the standard library of the running Python without its tests.
        max_length: the maximum number of characters in a function, without docstring and comments.
    """
    sources = {name: source for name, source in sorted(functions_alone(path)) if len(source) <= max_length}
    tried = [([source], calls_to_try(source)) for source in sources.values()]
    said = run_calls(tried, seconds=SECONDS, limits=EVERYTHING)
    chosen = {name: choose(calls, results) for name, (_, calls), (results,) in zip(sources, tried, said, strict=True)}
    chosen = {name: told for name, told in chosen.items() if enough(told)}
    bugs = {name: bugs_of(sources[name]) for name in chosen}
    programs = [([sources[name], *(bug.source for bug in bugs[name])], list(told)) for name, told in chosen.items()]
    again = run_calls(programs, seconds=SECONDS, limits=EVERYTHING)
    found = []
    for (name, told), (right, *wrong) in zip(chosen.items(), again, strict=True):
        seen = [
            (bug.kind, bug.source, tuple(results))
            for bug, results in zip(bugs[name], wrong, strict=True)
            if results != right and UNFINISHED not in results
        ]
        if seen and right == list(told.values()):
            found.append(BrokenFunction(name, sources[name], tuple(told), tuple(right), tuple(seen)))
    return tuple(found)


def functions_alone(path: str | None) -> Iterator[tuple[str, str]]:
    """Yield the names and docstring-free sources of distinct top-level functions that `alone` accepts."""
    names, bodies = set(), set()
    for file in source_files(path):
        if path is None and TESTS & set(file.parts):
            continue
        for match in DEFINITION.finditer(file.read_text(errors="replace")):
            function = alone(match[0]) if len(match[0]) <= LONGEST_SOURCE else None
            if function is None or function.name in names:
                continue
            source = ast.unparse(function)
            body = source.partition("(")[2]
            if body not in bodies:
                names.add(function.name)
                bodies.add(body)
                yield function.name, source + "\n"


def alone(source: str) -> ast.FunctionDef | None:
    """Parse a function without docstring; return None if it needs or affects anything beyond arguments and builtins."""
    try:
        (function,) = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    nodes = list(ast.walk(function))
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.name or "" for node in nodes if isinstance(node, ast.FunctionDef | ast.ExceptHandler)}
    used = {node.id for node in nodes if isinstance(node, ast.Name)} - own
    if used - BUILTINS or any(isinstance(node, EFFECTS) for node in nodes) or not required(function):
        return None
    function.body = function.body[ast.get_docstring(function) is not None :] or [ast.Pass()]
    return function


def required(function: ast.FunctionDef) -> int:
    """Return the number of required arguments, or 0 if there are too many or keyword-only ones."""
    given = function.args
    if any(default is None for default in given.kw_defaults):
        return 0
    number = len(given.posonlyargs) + len(given.args) - len(given.defaults)
    return number if number <= len(TRIED) else 0


def calls_to_try(source: str) -> list[str]:
    """Return calls with arguments of all combinations of types, deterministic for each source."""
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    rng = np.random.default_rng(zlib.crc32(source.encode()))
    calls = []
    for kinds in product(VALUES, repeat=required(function)):
        for _ in range(TRIED[len(kinds) - 1]):
            arguments = ", ".join(VALUES[kind][rng.integers(len(VALUES[kind]))] for kind in kinds)
            calls.append(f"{function.name}({arguments})")
    return list(dict.fromkeys(calls))


def choose(calls: list[str], said: list[str]) -> dict[str, str]:
    """Return up to 16 calls with short, plain results, which are as diverse as possible."""
    by_result: dict[str, list[str]] = {}
    for call, result in zip(calls, said, strict=True):
        if len(result) <= LONGEST_REPR and is_plain(result):
            by_result.setdefault(result, []).append(call)
    turns = zip_longest(*([(call, result) for call in told] for result, told in by_result.items()))
    return dict([pair for turn in turns for pair in turn if pair is not None][:MOST_CALLS])


def enough(told: dict[str, str]) -> bool:
    """Return True if there are enough calls and different results to distinguish functions."""
    return len(told) >= FEWEST_CALLS and len(set(told.values())) >= FEWEST_RESULTS


def is_plain(result: str) -> bool:
    """Return True if a repr is a literal: numbers, strings and containers of them."""
    if result.startswith(RAISED) or result == UNFINISHED:
        return False
    try:
        ast.literal_eval(result)
    except (ValueError, SyntaxError):
        return False
    return True
