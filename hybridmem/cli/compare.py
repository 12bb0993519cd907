"""`hybridmem compare`: execution of a grid, from its configuration to its report."""

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
from hybridmem.compare.runs import Status, check_settings, check_starts, execute_all, held, reason, status
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

    A further call skips finished runs, and repeats or resumes failed and interrupted ones. On Ctrl-C, active runs save
    a checkpoint.

    Args:
        tasks: settings of each task in the grid, by name.
        output: folder of all runs, results.json and report.html.
        parallel: number of parallel runs, with one thread each. None: one per core, or one per GPU if a run may use it.
        only: execute a single run by its number (see list_runs), for job arrays. Run the command without it afterwards
            to write the report.
        list_runs: only print all runs with their numbers and status.
        report_only: only write the report of the runs that have finished so far.
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
            raise ValueError(f"only={only} is incompatible with report_only=true; remove one of the two")
        if not 0 <= only < len(runs):
            raise ValueError(f"only={only} must be between 0 and {len(runs) - 1}, a run's number (see list_runs)")
        runs = [runs[only]]
        _check_start(runs[0], output)
    if report_only and not output.is_dir():
        raise FileNotFoundError(f"output={output} does not exist, so there is no run to report; leave out report_only")
    check_settings(runs, tasks, output)
    waiting = [run for run in runs if status(output / run.folder) != "finished"]
    if not report_only:
        check_starts(waiting, tasks, output)
        with held(waiting, output):
            _execute(waiting, tasks, output, parallel)
    if only is None:
        results = collect(tasks, output, command=_command(sys.argv))
        results["configuration"] = _plain({name: asdict(task) for name, task in tasks.items()})
        add_subnetworks(results, output)
        (output / RESULTS).write_text(as_json(results))
        show_report(results, output)


def _command(arguments: list[str]) -> str:
    """Return the command line that produces these results, of hybridmem or a script, without `report_only`."""
    program, *options = arguments
    is_script = program.endswith(".py") and Path(program).name != "__main__.py"
    line = shlex.join([*(["python", program] if is_script else ["hybridmem"]), *options])
    return re.sub(r" --report_only(=| )\S+", "", line)


def _execute(runs: list[Run], tasks: dict[str, Comparison], output: Path, parallel: int | None) -> None:
    """Execute the runs, with a progress bar on a terminal and a line as each run ends."""
    output.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
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
        raise ValueError(f"{run} needs {run.after}, which has not finished in output={output}; execute that run first")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings, default=lambda x: x.data if isinstance(x, UserDict | UserList) else str(x)))
