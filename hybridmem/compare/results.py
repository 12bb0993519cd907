"""Results of a grid as one plain dictionary, the content of results.json."""

import json
import math
import re
from pathlib import Path
from typing import Any

from hybridmem.metrics.interval import mean_interval
from hybridmem.training.logs import read_log

from .environment import read_environment
from .grid import ACCURACY, START, Comparison, Run, plan, without_attention
from .runs import reason, status

RESULTS = "results.json"
PASS_AT_1 = "val/pass@1"
CURVES = ("reward", "entropy", "loss", "val/", "collapse/")  # prefixes of the metrics to keep over training
INNERMOST = re.compile(r"\[\n[^\[\]{}]*\]")  # multi-line lists without nested lists
Results = dict[str, Any]


def collect(tasks: dict[str, Comparison], root: Path, command: str) -> Results:
    """Collect all results below `root`, with the environments that they come from.

    Raises:
        ValueError: a task's cells did not log its metric.
    """
    warm_ups, cells = plan(tasks)
    by_task: Results = {}
    for name, task in tasks.items():
        starts = [_run(run, root) for run in warm_ups if run.task == name]
        without = without_attention(task)
        runs = [_run(run, root) | {"without": without.get(run.control)} for run in cells if run.task == name]
        _check_metric(name, task.metric, runs)
        summary = summarise(runs, task.metric)
        by_task[name] = {"metric": task.metric, "warm_ups": starts, "cells": runs, "summary": summary}
    environments = _numbered([run for task in by_task.values() for run in runs_of(task)])
    return {"command": command, "environments": environments, "tasks": by_task}


def as_json(results: Results) -> str:
    """Format results as the text of results.json, with one line per point of a curve."""
    text = json.dumps(results, indent=1, allow_nan=False)
    return INNERMOST.sub(lambda found: re.sub(r"\n *", " ", found[0]), text) + "\n"


def runs_of(task: dict[str, Any]) -> list[dict[str, Any]]:
    """Return all runs of a task in results.json."""
    return [*task["warm_ups"], *task["cells"]]


def metric_name(task: dict[str, Any]) -> str:
    """Return the display name of a task's metric."""
    return str(task["metric"]).removeprefix("val/")


def of_prompts(task: dict[str, Any]) -> dict[str, Any] | None:
    """Return the metric of unchanged prompts, which is equal in all cells, or None if RankingScores did not log it."""
    name = f"val/prompt/{metric_name(task)}"
    found = (cell["last"][name] for cell in task["cells"] if name in cell.get("last", ()))
    return next((interval([score]) for score in found), None)


def summarise(cells: list[dict[str, Any]], metric: str = ACCURACY) -> list[dict[str, Any]]:
    """Return mean and interval over seeds for each architecture and control, with gains over the same seed's start."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["architecture"], cell["label"]), []).append(cell)
    rows = []
    for (architecture, label), group in groups.items():
        finished = [cell for cell in group if cell["status"] == "finished"]
        row: dict[str, Any] = {
            "architecture": architecture,
            "label": label,
            "seeds": [cell["seed"] for cell in finished],
            "failed": {str(cell["seed"]): cell["reason"] for cell in group if cell["status"] == "failed"},
            "missing": [cell["seed"] for cell in group if cell["status"] == "missing"],
        }
        if finished:
            row["score"] = interval([cell["last"][metric] for cell in finished])
            drawn = [cell["last"][PASS_AT_1] for cell in finished if PASS_AT_1 in cell["last"]]
            row["pass@1"] = interval(drawn) if len(drawn) == len(finished) else None
            gains = paired(groups.get((architecture, START), []), finished, metric)
            row["gain"] = interval(gains) if gains and label != START else None
            row["accuracy_at"] = _accuracy_at(finished)
            row["compute"] = _compute(finished)
        rows.append(row)
    return rows


def finished_cells(task: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the finished cells of a summary row."""
    same = (row["architecture"], row["label"])
    return [c for c in task["cells"] if (c["architecture"], c["label"]) == same and c["status"] == "finished"]


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the columns by which a summary's accuracy was logged, such as `closed` by AllocationCurve."""
    return list(dict.fromkeys(name.split("=", 1)[0] for row in rows for name in row.get("accuracy_at", ())))


def by_value(row: dict[str, Any], column: str) -> dict[str, dict[str, Any]]:
    """Return the accuracy of a summary row by the values of a column, with numbers in numerical order."""
    start = f"{column}="
    logged = row.get("accuracy_at", {}).items()
    found = {name.removeprefix(start): score for name, score in logged if name.startswith(start)}
    return dict(sorted(found.items(), key=lambda pair: _order_of(pair[0])))


def _order_of(value: str) -> tuple[float, str]:
    """Return a sort key for a value of a column, with numbers in numerical order."""
    return (float(value) if value.replace(".", "", 1).isdigit() else 0.0, value)


def paired(before: list[dict[str, Any]], after: list[dict[str, Any]], metric: str) -> list[float]:
    """Return differences in a metric for each seed that finished in both."""
    earlier = {cell["seed"]: cell["last"][metric] for cell in before if cell["status"] == "finished"}
    return [
        cell["last"][metric] - earlier[cell["seed"]]
        for cell in after
        if cell["seed"] in earlier and cell["status"] == "finished"
    ]


def _numbered(runs: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """Return the distinct environments of finished runs, and replace each run's `environment` by its index."""
    found: list[dict[str, Any] | None] = []
    for run in runs:
        if run["status"] == "finished":
            made_with = run["environment"]
            if made_with not in found:
                found.append(made_with)
            run["environment"] = found.index(made_with)
    return found


def _check_metric(name: str, metric: str, cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        if cell["status"] == "finished" and metric not in cell["last"]:
            logged = ", ".join(sorted(log for log in cell["last"] if log.startswith("val/")))
            raise ValueError(f"tasks.{name}.metric={metric} was not logged by {cell['folder']}; choose from {logged}")


def _run(run: Run, root: Path) -> dict[str, Any]:
    """Return a run's results; `last` holds the last value of each metric."""
    folder = root / run.folder
    state = status(folder)
    found: dict[str, Any] = {
        "architecture": run.architecture,
        "label": run.label,
        "control": run.control,
        "target": run.target,
        "masked": run.masked,
        "seed": run.seed,
        "folder": str(run.folder),
        "status": state,
        "reason": reason(folder) if state == "failed" else None,
    }
    if state != "finished":
        return found
    log = _numbers(read_log(folder))
    found["last"] = {name: values[max(values)] for name, values in log.items()}
    found["curves"] = {
        name: [[step, values[step]] for step in sorted(values)]
        for name, values in log.items()
        if name.startswith(CURVES)
    }
    return found | read_compute(folder) | {"environment": read_environment(folder)}


def _numbers(log: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Remove non-finite values, such as the accuracy of an unused format, because JSON cannot represent them."""
    finite = {name: {step: x for step, x in values.items() if math.isfinite(x)} for name, values in log.items()}
    return {name: values for name, values in finite.items() if values}


def read_compute(folder: Path) -> dict[str, Any]:
    """Return the cost that ComputeSpent recorded, or an empty dictionary."""
    path = folder / "compute.json"
    return {"compute": json.loads(path.read_text())} if path.exists() else {}


def interval(values: list[float]) -> dict[str, Any]:
    """Return the mean, half the width of the 95 % confidence interval, and the values."""
    mean, half = mean_interval(values)
    return {"mean": mean, "half": half, "values": values}


def _accuracy_at(cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the accuracy by values that AccuracyBy or AllocationCurve logged."""
    prefix = f"{ACCURACY}_at/"
    names = [name for name in cells[0]["last"] if name.startswith(prefix)]
    shared = [name for name in names if all(name in cell["last"] for cell in cells)]
    return {name.removeprefix(prefix): interval([cell["last"][name] for cell in cells]) for name in sorted(shared)}


def _compute(cells: list[dict[str, Any]]) -> dict[str, float]:
    spent = [cell["compute"] for cell in cells if "compute" in cell]
    return {name: sum(part[name] for part in spent) / len(spent) for name in spent[0]} if spent else {}
