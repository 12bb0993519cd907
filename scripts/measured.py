"""Measured rows in a JSON file, one a line, which are identified by some of their values."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Return the rows measured so far."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def key(row: Row, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the values that identify a row."""
    return tuple(row.get(name) for name in names)


def find_row(path: Path, wanted: Row, names: tuple[str, ...]) -> Row:
    """Return the row with the same identity as `wanted`, or `wanted` itself if there is none."""
    return next((row for row in read_rows(path) if key(row, names) == key(wanted, names)), wanted)


def put_row(path: Path, row: Row, names: tuple[str, ...]) -> None:
    """Write a row, replacing any row with the same identity."""
    kept = [other for other in read_rows(path) if key(other, names) != key(row, names)]
    machine = json.dumps(f"{platform.machine()}, {os.cpu_count()} cores")
    lines = ",\n".join(json.dumps(each) for each in sorted([*kept, row], key=lambda each: str(key(each, names))))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"machine": {machine}, "torch": "{torch.__version__}", "rows": [\n{lines}\n]}}\n')
