"""Files below a folder, including links, and their content, compressed or not."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO

SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}  # modules by file extension
CHUNK = 1 << 20


def files_below(folder: Path) -> list[Path]:
    """List the files below a folder, sorted, without hidden files and SKIPPED_FOLDERS.

    Links to folders are followed after the folder itself is listed. No folder is listed twice, so cycles are harmless.
    """
    files: list[Path] = []
    listed: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        for parent, folders, names in os.walk(waiting.pop(0)):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in listed:
                folders.clear()
                continue
            listed.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS)
            waiting += [Path(parent, name) for name in folders if Path(parent, name).is_symlink()]
            files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted((file for file in files if file.is_file()), key=Path.as_posix)


def is_jsonl(file: Path) -> bool:
    """Return True if a file has the extension of JSON lines, compressed or not."""
    plain = file.with_suffix("") if file.suffix.lower() in COMPRESSED else file
    return plain.suffix.lower() == ".jsonl"


def read_file(file: Path) -> bytes:
    """Return the decompressed content of a file.

    Raises:
        ValueError: the file cannot be decompressed.
    """
    return b"".join(_chunks(file))


def size_of(file: Path) -> int:
    """Return the size of a file's decompressed content in bytes.

    Raises:
        ValueError: the file cannot be decompressed.
    """
    if file.suffix.lower() not in COMPRESSED:
        return file.stat().st_size
    return sum(map(len, _chunks(file)))


def lines_of(file: Path) -> Iterator[bytes]:
    """Yield the lines of a file's decompressed content.

    Raises:
        ValueError: the file cannot be decompressed.
    """
    with _opened(file) as content:
        while line := _read(content.readline, file):
            yield line


def _chunks(file: Path) -> Iterator[bytes]:
    with _opened(file) as content:
        while chunk := _read(partial(content.read, CHUNK), file):
            yield chunk


def _opened(file: Path) -> IO[bytes]:
    ending = file.suffix.lower()
    return import_module(COMPRESSED[ending]).open(file) if ending in COMPRESSED else file.open("rb")


def _read(method: Callable[[], bytes], file: Path) -> bytes:
    try:
        return method()
    except Exception as error:  # depends on the decompression module
        if file.suffix.lower() not in COMPRESSED:
            raise
        raise ValueError(
            f"{file} cannot be decompressed ({error}): fetch it again, or remove the extension {file.suffix} if it is "
            "not compressed"
        ) from error
