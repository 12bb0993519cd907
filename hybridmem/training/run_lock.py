"""Locks that keep a second live run out of a folder.

A lock is a file that names the process that holds it. One whose process ended without releasing it is taken over: its
pid is gone, or belongs to a process that started at another time. Processes of other hosts and containers cannot be
looked up, so holders touch their files, and such a lock expires when nobody has touched it for EXPIRY seconds.
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
STATE, START_TIME = 0, 19  # fields of /proc/PID/stat, counted from behind the command's name

_held: set[Path] = set()  # by this process


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Args:
        pid: its number.
        started: when it started, as its system counts time; empty where that is unknown.
        host: the name of its machine.
        namespace: of its pid: containers of one host count processes from 1 each.
    """

    pid: int
    started: str
    host: str
    namespace: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LockedError(ValueError):
    """Another live process holds a lock."""

    def __init__(self, path: Path, holder: Holder):
        super().__init__(f"{path} is held by {holder}")
        self.path, self.holder = path, holder


@contextmanager
def hold(*paths: Path) -> Iterator[None]:
    """A context in which no other process can hold these locks; it removes their files at its end.

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
            file.truncate(0)  # Windows removes no open file
            path.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """Open a lock's file, which no other process reads or writes meanwhile."""
    while True:
        with path.open("a+") as file:
            _wait_for(file)
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):  # else its holder has just removed it
                    yield file
                    return


def _wait_for(file: IO[str]) -> None:
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    with suppress(OSError):  # a file system without locks of its own
        fcntl.flock(file, fcntl.LOCK_EX)


def _read_holder(file: IO[str]) -> Holder | None:
    """Return the process that a lock's file names, or None for an empty or damaged file."""
    file.seek(0)
    try:
        holder = Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None
    return holder if type(holder.pid) is int and 0 < holder.pid < 2**31 else None


def _is_live(holder: Holder, path: Path) -> bool:
    here = _this_process()
    if holder == here:  # else an earlier program of this process, which exec has replaced
        return path.resolve() in _held
    if (holder.host, holder.namespace) != (here.host, here.namespace) or not here.started:
        return not _has_expired(path)
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    started = _start_time(holder.pid)
    return started == holder.started if started else started is not None and not _has_expired(path)


def _has_expired(path: Path) -> bool:
    with tempfile.TemporaryFile(dir=path.parent) as probe:  # the file system's clock, not this host's
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
    """Return when a process started, an empty text where that is hidden, or None for one that has ended."""
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
    except OSError:  # /proc shows its user's own processes alone
        return ""
    return None if fields[STATE] in "ZX" else f"{fields[START_TIME]} {boot}"
