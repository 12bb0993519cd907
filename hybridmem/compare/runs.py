"""Parallel runs of a grid, each in its own process, resumed after a stop and with failures recorded."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Queue
from typing import Any, Literal

import torch
import yaml

from hybridmem.training.checkpoints.durable import to_go_on_from
from hybridmem.training.checkpoints.starting_points import check_starting_points
from hybridmem.training.run_lock import LockedError, hold

from .changes import write_changes
from .environment import write_environment
from .grid import Comparison, Run, as_arguments, fit_options

Status = Literal["finished", "failed", "missing"]
FINISHED, FAILED, SETTINGS, OUTPUT, LOCK = "finished", "failed.txt", "settings.json", "output.txt", "lock"
INTERRUPTED = (128 + signal.SIGINT, -signal.SIGINT, -signal.SIGTERM)  # saved, or had nothing to save
ON_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # more threads than cores slow a run tenfold


def status(folder: Path) -> Status:
    """Return a run's status; `missing` means not started or interrupted."""
    if (folder / FINISHED).exists():
        return "finished"
    return "failed" if (folder / FAILED).exists() else "missing"


def reason(folder: Path) -> str:
    """Return the reason for a run's failure."""
    return (folder / FAILED).read_text().strip()


def devices(runs: list[Run], tasks: dict[str, Comparison], root: Path) -> list[dict[str, str]]:
    """Return the environment variables of each parallel process: one per GPU if a run may use it, or one per core."""
    gpus = torch.cuda.device_count()
    if gpus and not all(_on_cpu(_settings(run, tasks[run.task], root)) for run in runs):
        return [{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in range(gpus)]
    return [ON_ONE_THREAD] * len(os.sched_getaffinity(0))


def _on_cpu(settings: dict[str, Any]) -> bool:
    written = (settings["config"].get("trainer") or {}).get("accelerator")
    return settings["options"].get("trainer.accelerator", written) == "cpu"


def check_settings(runs: list[Run], tasks: dict[str, Comparison], root: Path) -> None:
    """Raise a ValueError if a folder holds a run with other settings, whose results would be taken for this run's."""
    for run in runs:
        path = root / run.folder / SETTINGS
        if path.exists() and json.loads(path.read_text()) != _settings(run, tasks[run.task], root):
            raise ValueError(
                f"output={root}: {root / run.folder} holds a run with other settings (see {path}); choose another "
                "output, or remove that folder"
            )


def check_starts(runs: list[Run], tasks: dict[str, Comparison], root: Path) -> None:
    """Raise a FileNotFoundError if a run starts from a missing model or checkpoint that no run of the grid writes."""
    for run in runs:
        settings, task = _settings(run, tasks[run.task], root), tasks[run.task]
        model, data = _arguments(settings, "model"), _arguments(settings, "data")
        model = {name: value for name, value in model.items() if not str(value).startswith(f"{root}/")}
        check_starting_points(
            {"init_args": model}, {"init_args": data}, root, [task.train, *filter(None, [task.warm_up])]
        )


def _arguments(settings: dict[str, Any], part: str) -> dict[str, Any]:
    """Return the arguments of the Lightning module or the data module, with the run's options."""
    written = (settings["config"].get(part) or {}).get("init_args") or {}
    prefix = f"{part}.init_args."
    return written | {k.removeprefix(prefix): v for k, v in settings["options"].items() if k.startswith(prefix)}


@contextmanager
def held(runs: list[Run], root: Path) -> Iterator[None]:
    """Hold these runs for the duration of a context, so that no other process executes them.

    Each run's own process also holds the RUN_LOCK of its folder, like every `hybridmem fit`.

    Raises:
        ValueError: another process executes one of the runs.
    """
    locks = {root / run.folder / LOCK: run for run in runs}
    for path in locks:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(*locks))
        except LockedError as error:
            raise ValueError(
                f"output={root}: another process ({error.holder}) is running {locks[error.path]} there; wait for it, "
                "or choose another output"
            ) from error
        yield


def execute(
    run: Run, task: Comparison, root: Path, environment: dict[str, str], running: set[subprocess.Popen[bytes]]
) -> Status:
    """Execute or resume a run, and record its result; an interrupted run remains `missing`.

    `running` contains the run's process while it is alive.
    """
    folder = root / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    (folder / SETTINGS).write_text(json.dumps(_settings(run, task, root), indent=1) + "\n")
    write_environment(folder)
    command = [sys.executable, "-m", "hybridmem", run.command, *as_arguments(fit_options(run, task, root))]
    checkpoint = to_go_on_from(folder)
    if checkpoint is not None:
        command += ["--ckpt_path", str(checkpoint)]
    with (folder / OUTPUT).open("ab") as output:
        start = output.tell()
        # In its own session, so that Ctrl-C in the terminal reaches it only through _letting_runs_save.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
        )
        running.add(process)
        code = process.wait()
        running.discard(process)
    if code == 0:
        if run.is_trained and run.warm_up is not None:
            write_changes(root / run.warm_up.folder, folder)
        (folder / FINISHED).touch()
    elif code in INTERRUPTED:
        return "missing"
    else:
        text = (folder / OUTPUT).read_bytes()[start:].decode(errors="replace").strip()
        (folder / FAILED).write_text((text.splitlines() or [f"exit status {code}"])[-1] + "\n")
    return status(folder)


def execute_all(
    runs: list[Run],
    tasks: dict[str, Comparison],
    root: Path,
    parallel: int | None,
    report: Callable[[Run, Status], None],
) -> None:
    """Execute runs in parallel, each after the run that it depends on.

    `report` is called in this thread as each run ends. If a run fails, so do the runs that depend on it. On Ctrl-C or
    SIGTERM, the live processes save and no others start.
    """
    slots: Queue[dict[str, str]] = Queue()
    environments = devices(runs, tasks, root)
    for number in range(parallel or len(environments)):
        slots.put(environments[number % len(environments)])
    stopping = threading.Event()
    running: set[subprocess.Popen[bytes]] = set()

    def work(run: Run) -> Status:
        environment = slots.get()
        try:
            return "missing" if stopping.is_set() else execute(run, tasks[run.task], root, environment, running)
        finally:
            slots.put(environment)

    waiting = list(runs)
    started: dict[Future[Status], Run] = {}
    with ThreadPoolExecutor(slots.qsize()) as pool, _letting_runs_save(stopping, running):
        while waiting or started:
            for run in _ready(waiting, root):
                waiting.remove(run)
                started[pool.submit(work, run)] = run
            coming = {*started.values(), *waiting}  # includes new attempts at runs that failed before
            for run in [run for run in waiting if run.after not in coming and _failed_before(run, root)]:
                waiting.remove(run)
                _fail_with(run, root)
                report(run, "failed")
                coming.discard(run)
            if not started:
                break  # the remaining runs depend on one outside this list
            done, _ = wait(started, return_when=FIRST_COMPLETED)
            for future in done:
                report(started.pop(future), future.result())


@contextmanager
def _letting_runs_save(stopping: threading.Event, running: set[subprocess.Popen[bytes]]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM, start no further runs and signal the live ones to save; the pool waits for them."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except BaseException:
        stopping.set()
        for process in list(running):
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _ready(waiting: list[Run], root: Path) -> list[Run]:
    return [run for run in waiting if run.after is None or status(root / run.after.folder) == "finished"]


def _failed_before(run: Run, root: Path) -> bool:
    return run.after is not None and status(root / run.after.folder) == "failed"


def _fail_with(run: Run, root: Path) -> None:
    before = run.after
    assert before is not None
    (root / run.folder).mkdir(parents=True, exist_ok=True)
    warm_up = "its warm-up" if before.task == run.task else f"the warm-up of {before.task}"
    name = warm_up if before.is_warm_up else f"the run of {before.label!r}"
    (root / run.folder / FAILED).write_text(f"{name} failed: {reason(root / before.folder)}\n")


def _settings(run: Run, task: Comparison, root: Path) -> dict[str, Any]:
    """Return all settings that determine a run's result, as plain JSON values."""
    file = task.warm_up if run.is_warm_up and task.warm_up is not None else task.train
    options = {name: value for name, value in fit_options(run, task, root).items() if name != "config"}
    settings = {"options": options, "config": yaml.safe_load(file.read_text())}
    return json.loads(json.dumps(settings))
