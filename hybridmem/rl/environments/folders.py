"""Workspace folder with file tools, shared by environments with files."""

import shutil
import weakref
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp


class Files:
    """Temporary folder with the tools `ls` and `open`, which reject paths outside it; deleted with its owner."""

    def __init__(self) -> None:
        self._root = Path(mkdtemp(prefix="workspace-")).resolve()
        weakref.finalize(self, shutil.rmtree, self._root, ignore_errors=True)

    def _write(self, files: Mapping[str, str]) -> None:
        """Replace the folder's files."""
        for path in self._root.iterdir():
            path.unlink()
        for name, text in files.items():
            (self._root / name).write_text(text)

    def _file(self, path: str) -> Path:
        """Return the path of a file, with links resolved.

        Raises:
            ValueError: The file does not exist, or lies outside the folder.
        """
        whole = (self._root / path).resolve()
        if not whole.is_relative_to(self._root):
            raise ValueError(f"{path} is outside the folder")
        if not whole.is_file():
            raise ValueError(f"{path} does not exist")
        return whole

    def _lines_with(self, text: str) -> str:
        """Return the lines that contain a text, each after its file's name."""
        lines = [
            f"{path.name}:{line}"
            for path in sorted(self._root.iterdir())
            for line in path.read_text().splitlines()
            if text in line
        ]
        return "\n".join(lines) or "nothing"

    def ls(self) -> str:
        """Return the names of all files."""
        return " ".join(sorted(path.name for path in self._root.iterdir()))

    def open(self, path: str) -> str:
        """Return the content of a file.

        Args:
            path: the file's name.
        """
        return self._file(path).read_text()


def with_line(path: str, lines: list[str], line: int, text: str) -> str:
    """Return a file's text with a line, counted from 1, replaced; an empty text deletes the line.

    Raises:
        ValueError: The line does not exist.
    """
    if not 1 <= line <= len(lines):
        raise ValueError(f"{path} has lines 1 to {len(lines)}, but line is {line}")
    return "".join(f"{kept}\n" for kept in [*lines[: line - 1], *text.splitlines(), *lines[line:]])
