"""What a run logged, read from its CSV files."""

import csv
from pathlib import Path


def read_log(run: Path) -> dict[str, dict[int, float]]:
    """Everything a run logged, by name and step, over all its starts.

    Raises:
        FileNotFoundError: a folder without logs.
    """
    files = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    if not files:
        raise FileNotFoundError(f"{run} holds no csv/version_*/metrics.csv: is it the default_root_dir of a run?")
    log: dict[str, dict[int, float]] = {}
    for file in files:
        with file.open() as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        log.setdefault(name, {})[int(row["step"])] = float(value)
    return log
