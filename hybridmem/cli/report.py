"""`hybridmem report`: report of one grid, or a comparison of two."""

import json
from pathlib import Path
from typing import Any

from hybridmem.compare.report import show_report
from hybridmem.compare.results import RESULTS


def report(run_dir: Path, other: Path | None = None) -> None:
    """Rewrite the report of a grid from its results.json.

    Args:
        run_dir: output folder of `hybridmem compare`. Both folders can be positional arguments: hybridmem report A B.
        other: output folder of another grid to compare with.
    """
    results = _read(run_dir, "run_dir")
    show_report(results, run_dir, None if other is None else _read(other, "other"))


def _read(folder: Path, setting: str) -> dict[str, Any]:
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{setting}={folder} has no {RESULTS}; give the output folder of a finished hybridmem compare"
        )
    return json.loads(path.read_text())
