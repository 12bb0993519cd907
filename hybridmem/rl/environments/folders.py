"""A real folder that tools read: what environments with files share."""

import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp


class Files:
    """A folder of its own, with `ls` and `open`; paths that lead out of it are refused. It is gone with its owner."""

    def __init__(self) -> None:
        self._root = Path(mkdtemp(prefix="workspace-")).resolve()
        weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)

    def _write(self, files: Mapping[str, str]) -> None:
        """Make these the folder's files."""
        for path in self._root.iterdir():
            path.unlink()
        for name, text in files.items():
            (self._root / name).write_text(text)

    def _file(self, path: str) -> Path:
        """A file by its name, links followed.

        Raises:
            ValueError: there is none, or it lies outside.
        """
        whole = (self._root / path).resolve()
        if not whole.is_relative_to(self._root):
            raise ValueError(f"{path} is outside of the folder")
        if not whole.is_file():
            raise ValueError(f"{path} does not exist")
        return whole

    def _lines_with(self, text: str) -> str:
        """Lines that hold a text, behind their file's name."""
        lines = [
            f"{path.name}:{line}"
            for path in sorted(self._root.iterdir())
            for line in path.read_text().splitlines()
            if text in line
        ]
        return "\n".join(lines) or "nothing"

    def ls(self) -> str:
        """Names of all files."""
        return " ".join(sorted(path.name for path in self._root.iterdir()))

    def open(self, path: str) -> str:
        """What a file holds.

        Args:
            path: its name.
        """
        return self._file(path).read_text()


def with_line(path: str, lines: list[str], line: int, text: str) -> str:
    """A file's text with another one in the place of a line, counted from 1; no text takes the line away.

    Raises:
        ValueError: there is no such line.
    """
    if not 1 <= line <= len(lines):
        raise ValueError(f"{path} has lines 1 to {len(lines)}, and none is {line}")
    return "".join(f"{kept}\n" for kept in [*lines[: line - 1], *text.splitlines(), *lines[line:]])
