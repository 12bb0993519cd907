"""Writes the tables of a grid (`hybridmem compare`) into docs/results/, between the markers of each task.

    python scripts/results_compare.py docs/data/compare/full/results.json

The tables of task NAME in the folder GRID go between `<!-- GRID/NAME -->` and `<!-- end of GRID/NAME -->`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tables import Table, write_tables

from hybridmem.compare.answer import percent
from hybridmem.compare.results import finished_cells, metric_name, of_prompts

Rows = list[dict[str, Any]]


def score_table(task: dict[str, Any], rows: Rows) -> Table:
    """Return a table of scores and gains."""
    table = [["architecture", "control", "seeds", metric_name(task), "gain", "pass@1"]]
    prompts = of_prompts(task)
    if prompts is not None:
        table.append(["", "unchanged prompts", "", percent(prompts), "", ""])
    for row in rows:
        scores = [percent(row["score"]), percent(row["gain"], signed=True), percent(row["pass@1"])]
        table.append([row["architecture"], row["label"], str(len(row["seeds"])), *scores])
    return table


def training_table(rows: Rows) -> Table:
    """Return a table of changed weights and seconds of the trained rows, or an empty one without any."""
    table = [["architecture", "control", "unchanged", "shared", "seconds"]]
    for row in rows:
        overlap, compute = row.get("overlap"), row.get("compute")
        figures = [
            percent(row.get("sparsity")),
            f"{100 * overlap['shares']:.0f} ({100 * overlap['chance']:.0f})" if overlap else "",
            f"{compute['seconds']:.0f}" if compute else "",
        ]
        if any(figures):
            table.append([row["architecture"], row["label"], *figures])
    return table if len(table) > 1 else []


def table_at(rows: Rows) -> Table:
    """Return a table of accuracy by a column of the examples, or an empty one if it was not logged."""
    rows = [row for row in rows if row["accuracy_at"]]
    names = sorted({name for row in rows for name in row["accuracy_at"]}, key=lambda name: float(name.split("=")[1]))
    table = [["architecture", "control", *names]]
    for row in rows:
        at = row["accuracy_at"]
        table.append([row["architecture"], row["label"], *(percent(at[name]) if name in at else "" for name in names)])
    return table if rows else []


def format_tables(task: dict[str, Any]) -> list[Table]:
    """Return tables of formats and of samples if FormatWatch logged formats, otherwise none."""
    shares = sorted({n for cell in task["cells"] for n in cell.get("last", ()) if n.startswith("val/format/share/")})
    if not shares:
        return []
    formats = [*shares, "val/format/entropy", "collapse/diversity", "collapse/distinct_patterns"]
    return [last_table(task, formats), last_table(task, ["val/pass@1", "val/pass@2", "val/pass@8", "val/maj@8"])]


def last_table(task: dict[str, Any], columns: list[str]) -> Table:
    """Return a table of the last value of each metric, as means over seeds."""
    titles = [name.rpartition("/")[2].removeprefix("distinct_") for name in columns]
    table = [["model", "control", "seeds", *titles]]
    for row in task["summary"]:
        cells = [cell["last"] for cell in finished_cells(task, row)]
        figures = [_mean([cell[name] for cell in cells if name in cell]) for name in columns]
        table.append([row["architecture"], row["label"], str(len(cells)), *figures])
    return table


def main() -> None:
    """Write the tables of every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    for name, task in json.loads(arguments.results.read_text())["tasks"].items():
        rows = [row for row in task["summary"] if "score" in row]
        if not rows:
            continue  # no finished runs
        tables = [score_table(task, rows), training_table(rows), table_at(rows), *format_tables(task)]
        write_tables(f"{arguments.results.parent.name}/{name}", [table for table in tables if table])


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3g}" if values else ""


if __name__ == "__main__":
    main()
