"""`hybridmem report`: a grid's report written again, or two grids side by side."""

import json
from pathlib import Path
from typing import Any

from hybridmem.compare.report import show_report
from hybridmem.compare.results import RESULTS


def report(run_dir: Path, other: Path | None = None) -> None:
    """Write the report of a grid again from its results.json.

    Args:
        run_dir: the output of `hybridmem compare`. The two can be given without their names: hybridmem report A B.
        other: the output of another one, to set beside it.
    """
    results = _read(run_dir, "run_dir")
    show_report(results, run_dir, None if other is None else _read(other, "other"))


def _read(folder: Path, setting: str) -> dict[str, Any]:
    path = folder / RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{setting}={folder} holds no {RESULTS}: give the output of a finished hybridmem compare"
        )
    return json.loads(path.read_text())
