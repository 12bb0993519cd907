"""Python programs that may do anything, and can do nothing: in namespaces of their own, on a copy of a folder.

    outcome = run_python(folder, ["test.py"], Limits(seconds=2))
    outcome.returncode, outcome.output

No network, no file of the host but Python's own, to read; no process, variable or right of the caller; limits of time,
memory, processes, disk and output. What the program writes goes to a copy in memory, so the folder stays as it is. When
it is over, all that the program started is over. It takes nothing but Linux and costs tens of milliseconds.
"""

import marshal
import os
import platform
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hybridmem.checks import at_least

from . import child as jail

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
GRACE = 60.0  # seconds to build the sandbox and to tear it down
WHAT_IT_NEEDS = (
    "it needs Linux 5.12 or newer on x86_64 or aarch64, with user namespaces for everyone: "
    "sysctl user.max_user_namespaces above 0; on Debian kernel.unprivileged_userns_clone=1; on Ubuntu "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container a seccomp profile that allows them"
)


class SandboxError(RuntimeError):
    """The system cannot isolate a program. Nothing is run then."""


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Args:
        seconds: of the clock, from the program's start on, and of the processor.
        memory: bytes of each process.
        processes: and threads, all together.
        output: bytes that it may say, and of any file; what is more cannot be written.
        disk: bytes of all files, in memory.
    """

    seconds: float = 2.0
    memory: int = 256 * 2**20
    processes: int = 8
    output: int = 2**18
    disk: int = 16 * 2**20

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds} must be above 0")
        at_least(1, processes=self.processes, output=self.output, disk=self.disk)
        at_least(64 * 2**20, memory=self.memory)  # less than Python takes to start


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    Args:
        returncode: 0 if it ended well, -n if signal n ended it, None if its time was over.
        output: what it said, errors too.
    """

    returncode: int | None
    output: str

    @property
    def timed_out(self) -> bool:
        """Whether it was ended because its time was over."""
        return self.returncode is None


def run_python(folder: Path | str, arguments: list[str], limits: Limits | None = None) -> Outcome:
    """Run this Python, with its standard library alone, on a copy of a folder.

    Args:
        folder: its copy is what the program works in; no link in it leads anywhere else.
        arguments: the program's path in the folder and what it is given, or -c and a program.
        limits: of time, memory, processes, output and disk.

    Raises:
        SandboxError: the system cannot isolate it; it says what is missing.
        ValueError: the folder is larger than the limit of disk.
        NotADirectoryError: there is no such folder.
    """
    if platform.system() != "Linux" or platform.machine() not in jail.MACHINES:
        raise SandboxError(f"no sandbox on {platform.system()} {platform.machine()}: {WHAT_IT_NEEDS}")
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"folder={str(folder)!r} is no folder")
    limits, python = limits or Limits(), interpreter()
    output = os.memfd_create("output")
    settings = {
        "folder": os.path.realpath(folder),
        "command": [python, "-s", "-S", "-B", *arguments],
        "environment": {"HOME": jail.HOME, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"},
        "seconds": limits.seconds,
        "disk": limits.disk,
        "limits": _resource_limits(limits),
        "output": output,
        "readable": readable(),
        "hidden": hidden(),
    }
    try:
        told = _kept([python, "-I", "-S", "-B", jail.__file__], settings, output, limits.seconds + GRACE)
        said = os.pread(output, limits.output, 0).decode(errors="replace")
    finally:
        os.close(output)
    kind, _, rest = told.partition(" ")
    if kind == "returned":
        return Outcome(int(rest), said)
    if kind == "full":
        raise ValueError(f"disk={limits.disk} is too small for a copy of folder={str(folder)!r}: raise it")
    if kind == "overran":
        return Outcome(None, said)
    raise SandboxError(f"the sandbox cannot be built, {rest if kind == 'failed' else told}: {WHAT_IT_NEEDS}")


def _kept(command: list[str], settings: dict[str, Any], output: int, seconds: float) -> str:
    """The first line of what the keeper tells of a program."""
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(command, env={}, cwd="/", pass_fds=[output], start_new_session=True, **pipes) as keeper:
        try:
            told, _ = keeper.communicate(marshal.dumps(settings), timeout=seconds)
        except subprocess.TimeoutExpired:
            return "overran"
        finally:
            keeper.kill()
    return told.decode(errors="replace").partition("\n")[0]


def _resource_limits(limits: Limits) -> dict[str, int]:
    return {
        "RLIMIT_AS": limits.memory,
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": int(limits.seconds) + 1,
        "RLIMIT_FSIZE": limits.output,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": limits.processes,
    }


@cache
def interpreter() -> str:
    """This Python, not that of a virtual environment, which would look for its packages."""
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]


@cache
def readable() -> list[tuple[str, str]]:
    """What a program can read of the host: (where, what is there), folders before what lies in them."""
    base = {
        "installed_base": sys.base_prefix,
        "installed_platbase": sys.base_exec_prefix,
        "platbase": sys.base_exec_prefix,
    }
    python = [os.path.dirname(sysconfig.get_path(name, vars=base)) for name in ("stdlib", "platstdlib")]
    paths = {*LIBRARIES, *python, interpreter(), "/dev/null"}
    return [(path, os.path.realpath(path)) for path in sorted(paths) if os.path.exists(path)]


@cache
def hidden() -> list[str]:
    """Folders of installed packages in there."""
    folders = [Path(path) for path, _ in readable() if os.path.isdir(path)]
    return sorted({str(found) for folder in folders for found in folder.glob("python3*/*-packages") if found.is_dir()})
