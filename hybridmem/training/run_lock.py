"""Locks that keep a second live run out of a folder.

A lock is a file that names the process holding it. A new run takes over the lock of a process that ended without
releasing it: the pid is unused, or its process has another start time. Processes on other hosts and in other
containers cannot be inspected. Holders therefore touch their files regularly, and a foreign lock expires EXPIRY seconds
after the last touch.
"""

import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

RUN_LOCK = "run.lock"
HEARTBEAT, EXPIRY = 20.0, 120.0  # seconds
STATE, START_TIME = 0, 19  # fields of /proc/PID/stat, counted after the command's name

_held: set[Path] = set()  # locks that this process holds


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Args:
        pid: process ID.
        started: start time in the system's own format, or an empty string if unknown.
        host: host name.
        namespace: PID namespace; every container on a host numbers its processes from 1.
    """

    pid: int
    started: str
    host: str
    namespace: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LockedError(ValueError):
    """An error raised when another live process holds a lock."""

    def __init__(self, path: Path, holder: Holder):
        super().__init__(f"{path} is held by {holder}")
        self.path, self.holder = path, holder


@contextmanager
def hold(*paths: Path) -> Iterator[None]:
    """Hold locks for the duration of a context, and remove their files at the end.

    Raises:
        LockedError: a live process holds one of them.
    """
    with ExitStack() as stack:
        for path in paths:
            _acquire(path)
            stack.callback(_release, path)
        ended = threading.Event()
        stack.callback(ended.set)
        threading.Thread(target=_touch_until, args=(ended, paths), name="run lock", daemon=True).start()
        yield


def _acquire(path: Path) -> None:
    with _opened(path) as file:
        holder = _read_holder(file)
        if holder is not None and _is_live(holder, path):
            raise LockedError(path, holder)
        file.truncate(0)
        file.write(json.dumps(asdict(_this_process())) + "\n")
        file.flush()
    _held.add(path.resolve())


def _release(path: Path) -> None:
    _held.discard(path.resolve())
    with suppress(OSError), _opened(path) as file:  # the folder may be gone
        if _read_holder(file) in (None, _this_process()):
            file.truncate(0)  # Windows cannot remove an open file
            path.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open a lock's file with exclusive access."""
    while True:
        with path.open("a+") as file:
            _wait_for(file)
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):  # else its holder just removed it
                    yield file
                    return


def _wait_for(file: IO[str]) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    with suppress(OSError):  # the file system does not support locks
        fcntl.flock(file, fcntl.LOCK_EX)


def _read_holder(file: IO[str]) -> Holder | None:
    """Return the process recorded in a lock's file, or None if the file is empty or damaged."""
    file.seek(0)
    try:
        holder = Holder(**json.loads(file.read()))
    except (ValueError, TypeError, RecursionError):
        return None
    return holder if type(holder.pid) is int and 0 < holder.pid < 2**31 else None


def _is_live(holder: Holder, path: Path) -> bool:
    here = _this_process()
    if holder == here:  # unless held, the lock is left over from a program that exec replaced in this process
        return path.resolve() in _held
    if (holder.host, holder.namespace) != (here.host, here.namespace) or not here.started:
        return not _has_expired(path)
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a live process of another user
        pass
    started = _start_time(holder.pid)
    return started == holder.started if started else started is not None and not _has_expired(path)


def _has_expired(path: Path) -> bool:
    with tempfile.TemporaryFile(
        dir=path.parent
    ) as probe:  # reads the file system's clock, which may differ from this host's
        return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime > EXPIRY


def _touch_until(ended: threading.Event, paths: tuple[Path, ...]) -> None:
    while not ended.wait(HEARTBEAT):
        for path in paths:
            with suppress(OSError):
                os.utime(path)


def _this_process() -> Holder:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return Holder(os.getpid(), _start_time(os.getpid()) or "", socket.gethostname(), namespace)


def _start_time(pid: int) -> str | None:
    """Return a process's start time, an empty string if it is hidden, or None if the process has ended."""
    if Path("/proc/self/stat").exists():
        return _start_time_in_proc(pid)
    if os.name != "posix":
        return ""
    listed = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return listed.stdout.strip() or None


def _start_time_in_proc(pid: int) -> str | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except ProcessLookupError:
        return None
    except OSError:  # /proc hides other users' processes
        return ""
    return None if fields[STATE] in "ZX" else f"{fields[START_TIME]} {boot}"
