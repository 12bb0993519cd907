"""Forked processes of distributed tests and of commands, which share the parent's imports."""

import io
import multiprocessing
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist

from hybridmem.cli.main import main

SECONDS = 120  # timeout of deadlocked processes


def as_processes(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return the results of `function(rank, *arguments)` in `size` processes with a gloo group."""
    port = free_port()

    def work(rank: int) -> Any:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        try:
            return function(rank, *arguments)
        finally:
            dist.destroy_process_group()

    return forked(size, work)


def fit(size: int, *arguments: object, output: Path | None = None) -> None:
    """Run `hybridmem fit` in several processes, like torchrun."""
    forked(size, command(size, "fit", *arguments))


def command(size: int, *arguments: object) -> Callable[[int], None]:
    """Run a command of `hybridmem` as one of several processes."""
    port = free_port()

    def work(rank: int) -> None:
        group = dict(RANK=rank, LOCAL_RANK=rank, GROUP_RANK=0, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        there = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")
        os.environ |= {name: str(value) for name, value in {**group, **there}.items()}
        sys.argv = ["hybridmem", *map(str, arguments)]
        main()

    return work


def forked(size: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of `work(rank)` in `size` processes, and raise the error of any of them."""
    processes = start(size, work)
    results = {}
    for rank, (process, receive) in enumerate(processes):
        late = ("error", f"process {rank} took too long")
        results[rank] = torch.load(io.BytesIO(receive.recv_bytes())) if receive.poll(SECONDS) else late
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
    failures = [result[1] for result in results.values() if result[0] == "error"]
    assert not failures, "\n".join(failures)
    return [results[rank][1] for rank in range(size)]


def start(size: int, work: Callable[[int], Any]) -> list[tuple[Any, Any]]:
    """Start processes; return them and the pipes of their ("done", result) or ("error", text)."""
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(work, rank, send))
        process.start()
        send.close()
        started.append((process, receive))
    return started


class Forked:
    """Process of `python -m hybridmem` with the arguments and methods of subprocess.Popen that grids use."""

    def __init__(self, command: list[str], stdout: IO[bytes], env: dict[str, str], **_: Any):
        assert command[:3] == [sys.executable, "-m", "hybridmem"]
        self.id = os.fork()
        if not self.id:
            self._run(command[2:], stdout, env)

    def _run(self, arguments: list[str], output: IO[bytes], environment: dict[str, str]) -> NoReturn:
        code: Any = 1
        try:
            os.setsid()
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
            os.environ |= environment
            warnings.simplefilter("ignore")
            sys.argv = arguments
            main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self) -> int:
        """Return the exit status, or minus the signal that ended the process."""
        return os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])

    def terminate(self) -> None:
        os.kill(self.id, signal.SIGTERM)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _report(work: Callable[[int], Any], rank: int, send: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        result = ("done", work(rank))
    except BaseException:  # includes SystemExit of the command line
        result = ("error", f"process {rank}:\n{traceback.format_exc()}")
    content = io.BytesIO()
    torch.save(result, content)  # serialised, because shared memory would vanish with the process
    send.send_bytes(content.getvalue())
