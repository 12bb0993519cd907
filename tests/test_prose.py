"""Limits on the prose: docstring openers, the word "what", line lengths of the guides, formatter exceptions."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .imports import ROOT

CODE = ("hybridmem", "kernels", "scripts", "examples")
GUIDES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "kernels")
OPENER = re.compile(r"(What|How|Which|Whether|Where|Who|The same|Those|That)\b")
WHAT = re.compile(r"\bwhat\b", re.IGNORECASE)
EXCEPTION = re.compile(r"# fmt: ?(?:skip|off)\b")

MOST_OPENERS = 0.01  # of all docstrings
MOST_WHATS = 15 / 10_000  # of all words
MOST_EXCEPTIONS = 14  # in the whole repository
LONGEST_LINE = 100  # characters of a guide


def files(suffix: str, *parts: str) -> list[Path]:
    """List the files below the given parts of the repository, leaving out ignored ones."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-co", "--exclude-standard", "--", *(parts or (".",))]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in out.stdout.splitlines()]
    else:
        roots = [ROOT / part for part in parts] or [ROOT]
        paths = [path for root in roots for path in ([root] if root.is_file() else root.rglob("*"))]
    return sorted({path for path in paths if path.suffix == suffix and path.exists()})


def docstrings() -> Iterator[tuple[Path, int, str]]:
    """Yield each docstring of the code with its file and first line."""
    for path in files(".py", *CODE):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield path, node.body[0].lineno, text


def guide_lines() -> Iterator[tuple[Path, int, str]]:
    """Yield each line of the guides with its file and number."""
    for path in files(".md", *GUIDES):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            yield path, number, line


def listed(places: list[tuple[Path, int, str]]) -> str:
    """Format places as `file:line: text`, one per line."""
    return "".join(f"\n{path.relative_to(ROOT)}:{number}: {text.strip()[:80]}" for path, number, text in places)


def test_docstrings_open_with_a_verb_or_a_noun():
    found = list(docstrings())
    openers = [(path, number, text.splitlines()[0]) for path, number, text in found if OPENER.match(text)]
    assert len(openers) < MOST_OPENERS * len(found), f"{len(openers)} of {len(found)} docstrings:{listed(openers)}"


def test_docstrings_and_guides_rarely_use_the_word_what():
    lines = [
        (path, first + offset, line)
        for path, first, text in docstrings()
        for offset, line in enumerate(text.splitlines())
    ]
    lines += guide_lines()
    words = sum(len(line.split()) for _, _, line in lines)
    uses = [place for place in lines for _ in WHAT.findall(place[2])]
    assert len(uses) < MOST_WHATS * words, f"{len(uses)} in {words} words:{listed(uses)}"


def test_lines_of_guides_are_short():
    long = [place for place in guide_lines() if len(place[2]) > LONGEST_LINE]
    assert not long, f"{len(long)} lines exceed {LONGEST_LINE} characters:{listed(long)}"


def test_few_lines_are_exempt_from_the_formatter():
    exempt = [
        (path, number, line)
        for path in files(".py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if EXCEPTION.search(line)
    ]
    assert len(exempt) <= MOST_EXCEPTIONS, f"{len(exempt)} lines:{listed(exempt)}"
