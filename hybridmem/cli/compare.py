"""`hybridmem compare`: a grid from its configuration to its report."""

import json
import re
import shlex
import sys
from collections import UserDict, UserList
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hybridmem.compare.grid import ACCURACY, Comparison, Run, check_grid, plan
from hybridmem.compare.report import show_report
from hybridmem.compare.results import RESULTS, as_json, collect
from hybridmem.compare.runs import Status, check_settings, execute_all, held, reason, status
from hybridmem.compare.subnetworks import add_subnetworks
from hybridmem.training.logs import read_log


def compare(
    tasks: dict[str, Comparison],
    output: Path = Path("runs/compare"),
    parallel: int | None = None,
    only: int | None = None,
    list_runs: bool = False,
    report_only: bool = False,
) -> None:
    """Run a grid of architectures × controls × targets × seeds, and write its report.

    What is finished is not run again, what failed or was interrupted is. Ctrl-C lets the running cells save.

    Args:
        tasks: each task's part of the grid, by name.
        output: the folder of all runs, of results.json and report.html.
        parallel: runs at a time, one thread each; as many as cores if not given, or as GPUs where a run asks for one.
        only: make the run of this number alone, for job arrays; see list_runs. The report is written by a call without.
        list_runs: print the runs with their numbers, and how they stand, and do nothing.
        report_only: run nothing; write the report of what is finished, while others run or before they do.
    """
    if parallel is not None and parallel < 1:
        raise ValueError(f"parallel={parallel} must be at least 1")
    check_grid(tasks)
    warm_ups, cells = plan(tasks)
    runs = [*warm_ups, *cells]
    if list_runs:
        for number, run in enumerate(runs):
            begins = f", from {run.after.task}" if run.is_warm_up and run.after is not None else ""
            print(f"{number:4} {status(output / run.folder):8} {run}{begins}")
        return
    if only is not None:
        if report_only:
            raise ValueError("only makes one run and report_only none: leave one of them out")
        if not 0 <= only < len(runs):
            raise ValueError(f"only={only} must be at least 0 and below {len(runs)}, the number of runs")
        runs = [runs[only]]
        _check_start(runs[0], output)
    check_settings(runs, tasks, output)
    waiting = [run for run in runs if status(output / run.folder) != "finished"]
    if not report_only:
        with held(waiting, output):
            _execute(waiting, tasks, output, parallel)
    if only is None:
        results = collect(tasks, output, command=_command(sys.argv[1:]))
        results["configuration"] = _plain({name: asdict(task) for name, task in tasks.items()})
        add_subnetworks(results, output)
        (output / RESULTS).write_text(as_json(results))
        show_report(results, output)


def _command(arguments: list[str]) -> str:
    """What makes these figures: `report_only` makes none."""
    line = shlex.join(["hybridmem", *arguments])
    return re.sub(r" --report_only(=| )\S+", "", line)


def _execute(runs: list[Run], tasks: dict[str, Comparison], output: Path, parallel: int | None) -> None:
    """Make the runs, with a bar on a terminal and a line for each as it ends."""
    output.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    best = (0.0, "")
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=3600) as progress:
        bar = progress.add_task("runs", total=len(runs))

        def hear(run: Run, state: Status) -> None:
            nonlocal best
            progress.advance(bar)
            said = f"{run}: {state}"
            if state == "failed":
                said += f" ({reason(output / run.folder)})"
            elif state == "finished":
                log = read_log(output / run.folder)
                values = log[ACCURACY if run.is_warm_up else tasks[run.task].metric]
                score = values[max(values)]
                said += f", {100 * score:.1f} %"
                if run.is_trained and score > best[0]:
                    best = (score, f"{run}: {100 * score:.1f} %")
                    progress.update(bar, description=f"best so far {best[1]}")
            progress.console.print(said, markup=False, highlight=False)

        execute_all(runs, tasks, output, parallel, hear)


def _check_start(run: Run, output: Path) -> None:
    if run.after is not None and status(output / run.after.folder) != "finished":
        raise ValueError(f"{run} goes on from {run.after}, which is not finished in output={output}: run that first")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=lambda x: x.data if isinstance(x, UserDict | UserList) else str(x)))
