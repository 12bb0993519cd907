"""Runs of a grid in processes of their own: side by side, resumed where they stopped, failures kept."""

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
from hybridmem.training.run_lock import LockedError, hold

from .changes import write_changes
from .environment import write_environment
from .grid import Comparison, Run, as_arguments, fit_options

Status = Literal["finished", "failed", "missing"]
FINISHED, FAILED, SETTINGS, OUTPUT, LOCK = "finished", "failed.txt", "settings.json", "output.txt", "lock"
INTERRUPTED = (
    128 + signal.SIGINT,
    -signal.SIGINT,
    -signal.SIGTERM,
)  # after saving, or before there was anything to save
ON_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # processes that share cores slow each other tenfold


def status(folder: Path) -> Status:
    """Whether a run was finished, failed, or is still to be made."""
    if (folder / FINISHED).exists():
        return "finished"
    return "failed" if (folder / FAILED).exists() else "missing"


def reason(folder: Path) -> str:
    """Why a run failed."""
    return (folder / FAILED).read_text().strip()


def devices(runs: list[Run], tasks: dict[str, Comparison], root: Path) -> list[dict[str, str]]:
    """The environment of each process that can run at a time: one a core, or one a GPU where a run asks for any."""
    gpus = torch.cuda.device_count()
    if gpus and not all(_on_cpu(_settings(run, tasks[run.task], root)) for run in runs):
        return [{"CUDA_VISIBLE_DEVICES": str(gpu)} for gpu in range(gpus)]
    return [ON_ONE_THREAD] * len(os.sched_getaffinity(0))


def _on_cpu(settings: dict[str, Any]) -> bool:
    written = (settings["config"].get("trainer") or {}).get("accelerator")
    return settings["options"].get("trainer.accelerator", written) == "cpu"


def check_settings(runs: list[Run], tasks: dict[str, Comparison], root: Path) -> None:
    """Raise a ValueError where a folder holds a run with other settings: its figures would pass for these."""
    for run in runs:
        path = root / run.folder / SETTINGS
        if path.exists() and json.loads(path.read_text()) != _settings(run, tasks[run.task], root):
            raise ValueError(
                f"output={root}: {root / run.folder} was made with other settings ({path} has them): choose another "
                "output, or remove that folder"
            )


@contextmanager
def held(runs: list[Run], root: Path) -> Iterator[None]:
    """A context in which no other process may make these runs.

    Each run's own process holds its folder's RUN_LOCK besides, as every `hybridmem fit` does.

    Raises:
        ValueError: another process makes one of them.
    """
    locks = {root / run.folder / LOCK: run for run in runs}
    for path in locks:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(*locks))
        except LockedError as error:
            raise ValueError(
                f"output={root}: another process makes {locks[error.path]} there ({error.holder}): wait for it, or "
                "choose another output"
            ) from error
        yield


def execute(
    run: Run, task: Comparison, root: Path, environment: dict[str, str], running: set[subprocess.Popen[bytes]]
) -> Status:
    """Make a run, or go on with it, and note how it ended; a run that is interrupted stays `missing`.

    `running` has its process meanwhile.
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
        # In a session of its own: a terminal's Ctrl-C reaches it once, from _letting_runs_save.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
        )
        running.add(process)
        code = process.wait()
        running.discard(process)
    if code == 0:
        if run.is_trained:
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
    """Make all runs that are not finished, warm-ups first; `report` hears of each as it ends, in this thread.

    A run fails with the one that it waits for. Ctrl-C or SIGTERM lets the processes save, and starts no others.
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
            coming = {*started.values(), *waiting}  # what failed before is being made again
            for run in [run for run in waiting if run.after not in coming and _failed_before(run, root)]:
                waiting.remove(run)
                _fail_with(run, root)
                report(run, "failed")
                coming.discard(run)
            if not started:
                break  # what is left waits for a run that is not among these
            done, _ = wait(started, return_when=FIRST_COMPLETED)
            for future in done:
                report(started.pop(future), future.result())


@contextmanager
def _letting_runs_save(stopping: threading.Event, running: set[subprocess.Popen[bytes]]) -> Iterator[None]:
    """On Ctrl-C or SIGTERM start no further runs, and tell those under way to save; the pool waits for them."""
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
    """All that decides what a run does; read back from JSON it must equal itself."""
    file = task.warm_up if run.is_warm_up else task.train
    options = {name: value for name, value in fit_options(run, task, root).items() if name != "config"}
    settings = {"options": options, "config": yaml.safe_load(file.read_text())}
    return json.loads(json.dumps(settings))
