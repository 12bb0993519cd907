"""Cells of an evaluation in a JSON file, which is written after each cell so that an interrupted run can resume."""

import json
import os
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
LOSS = "loss_by_position"  # the row whose scores are bits per byte
ANY_LENGTH = 0  # of rows without lengths
RESULTS = "results.json"


class Cells:
    """Measured cells by row and length, with the settings used to measure them.

    Args:
        folder: folder of the file.
        settings: settings of this run.

    Raises:
        ValueError: the folder holds cells of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path, self.settings = folder / RESULTS, settings
        self.cells: dict[str, Cell] = {}
        if self.path.exists():
            found = json.loads(self.path.read_text())
            other = [name for name, value in settings.items() if found["settings"].get(name) != value]
            if other:
                name = other[0]
                raise ValueError(
                    f"output={folder} holds results of {name}={found['settings'].get(name)!r}, and this run has "
                    f"{settings[name]!r}: choose another output, or remove it"
                )
            self.cells = found["cells"]

    def get(self, row: str, length: int) -> Cell | None:
        """Return a finished cell."""
        cell = self.cells.get(_key(row, length))
        return cell if cell and "score" in cell else None

    def add(self, row: str, length: int, cell: Cell) -> None:
        """Add a cell and write the file atomically."""
        self.cells[_key(row, length)] = {"task": row, "length": length, **cell}
        written = self.path.with_suffix(".tmp")
        written.write_text(json.dumps({"settings": self.settings, "cells": self.cells}, indent=1) + "\n")
        os.replace(written, self.path)

    def needed_bytes(self, length: int) -> float:
        """Return the bytes of the cache at a length, extrapolated from the longest shorter cell, or 0 without one."""
        shorter = [cell for cell in self.cells.values() if "state_bytes" in cell and cell["tokens"] < length]
        if not shorter:
            return 0
        last = max(shorter, key=lambda cell: cell["tokens"])
        return last["state_bytes"] + last["bytes_per_token"] * (length - last["tokens"])


def _key(row: str, length: int) -> str:
    return f"{row}@{length}"
