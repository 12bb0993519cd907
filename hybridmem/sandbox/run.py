"""Sandbox for untrusted Python programs, which run in separate namespaces on a copy of a folder.

    outcome = run_python(folder, ["test.py"], Limits(seconds=2))
    outcome.returncode, outcome.output

A program has no network, no host files except Python's own (read-only), and no access to the caller's processes,
environment variables or capabilities. Time, memory, processes, disk and output are limited. Writes go to an in-memory
copy, so the folder is never modified. When the program ends, all of its child processes are killed. The sandbox
requires only Linux and takes tens of milliseconds.
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
    """Error raised if the system cannot isolate a program, which is then not run."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program.

    Args:
        seconds: wall-clock time from the program's start, and CPU time.
        memory: bytes per process.
        processes: total number of processes and threads.
        output: maximum size of the output and of each file, in bytes; writes beyond it fail.
        disk: total size of all files in bytes, held in memory.
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
        at_least(64 * 2**20, memory=self.memory)  # Python cannot start with less


@dataclass(frozen=True)
class Outcome:
    """Result of a program.

    Args:
        returncode: 0 on success, -n if signal n killed it, None if it timed out.
        output: standard output and standard error.
    """

    returncode: int | None
    output: str

    @property
    def timed_out(self) -> bool:
        """Return True if the program was killed by the time limit."""
        return self.returncode is None


def run_python(folder: Path | str, arguments: list[str], limits: Limits | None = None) -> Outcome:
    """Run this Python interpreter, with only its standard library, on a copy of a folder.

    Args:
        folder: folder whose copy is the program's working directory; links cannot lead out of it.
        arguments: the program's path in the folder and its arguments, or -c and a program.
        limits: limits on time, memory, processes, output and disk.

    Raises:
        SandboxError: the system cannot isolate programs; the message lists the requirements.
        ValueError: the folder is larger than the disk limit.
        NotADirectoryError: the folder does not exist.
    """
    if platform.system() != "Linux" or platform.machine() not in jail.MACHINES:
        raise SandboxError(f"no sandbox on {platform.system()} {platform.machine()}: {WHAT_IT_NEEDS}")
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"folder={str(folder)!r} is not a folder: name an existing one")
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
    """Run the keeper and return the first line of its report."""
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
    """Return the path of the base interpreter; a virtual environment's interpreter would look for its packages."""
    return os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]


@cache
def readable() -> list[tuple[str, str]]:
    """List the host paths that a program can read as (path inside, path on the host), parents first."""
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
    """List the folders of installed packages below the readable paths, which the sandbox hides."""
    folders = [Path(path) for path, _ in readable() if os.path.isdir(path)]
    return sorted({str(found) for folder in folders for found in folder.glob("python3*/*-packages") if found.is_dir()})
