"""Metrics that a run logged, read from its CSV files."""

import csv
from pathlib import Path


def read_log(run: Path) -> dict[str, dict[int, float]]:
    """Return every metric of a run by name and step, across restarts.

    Raises:
        FileNotFoundError: the folder has no logs.
    """
    files = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    if not files:
        raise FileNotFoundError(f"{run} has no csv/version_*/metrics.csv; give the trainer.default_root_dir of a run")
    log: dict[str, dict[int, float]] = {}
    for file in files:
        with file.open() as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        log.setdefault(name, {})[int(row["step"])] = float(value)
    return log
