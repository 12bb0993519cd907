"""Sandboxed programs cannot escape in any of many ways, and ordinary programs work."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest

from hybridmem.sandbox import child as jail
from hybridmem.sandbox import run as sandbox
from hybridmem.sandbox.run import Limits, Outcome, SandboxError, run_python

from .isolation import needs_sandbox

pytestmark = needs_sandbox

# An attempt succeeds if it returns a non-empty value. An OSError counts as a refusal, and any other error is a bug in
# the attempt.
ATTEMPT = """
import ctypes, errno, mmap, os, pathlib, resource, shutil, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
OUTSIDE, PARENT, PORT, ABSTRACT, PACKAGES = {outside!r}, {parent}, {port}, {abstract!r}, {packages!r}

def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "a system call"

def attempt():
{code}

try:
    got = attempt()
except (OSError, MemoryError, ModuleNotFoundError, RuntimeError) as error:
    print("refused:", type(error).__name__, error)
else:
    print("got at" if got else "refused: nothing there", repr(got)[:80])
"""

# Harmless attempts, which must succeed outside the sandbox.
HARMLESS = {
    "read a file outside": "return open(OUTSIDE + '/secret').read()",
    "read a file outside through ..": "return open('../../../../../..' + OUTSIDE + '/secret').read()",
    "read through a link of its own": "os.symlink(OUTSIDE, 'own'); return open('own/secret').read()",
    "read through a link that the folder brings": "return open('brought').read()",
    "hard link to a file outside": "os.link(OUTSIDE + '/secret', OUTSIDE + '/linked'); return 'a link'",
    "write a file outside": "return open(OUTSIDE + '/written', 'w').write('here')",
    "append to a file outside": "return open(OUTSIDE + '/secret', 'a').write('.')",
    "change a file's rights outside": "os.chmod(OUTSIDE + '/secret', 0o644); return 'rights'",
    "make a folder outside": "os.mkdir(OUTSIDE + '/made'); return 'a folder'",
    "list a folder outside": "return os.listdir(OUTSIDE)",
    "learn that a file is there": "return os.stat(OUTSIDE + '/secret').st_size",
    "users of the machine": "return open('/etc/passwd').read()",
    "secrets of the environment": "return [value for value in os.environ.values() if 'token' in value]",
    "environment in /proc": "return open('/proc/self/environ').read()",
    "environment of the parent": "return open(f'/proc/{PARENT}/environ').read()",
    "memory of the parent": "return open(f'/proc/{PARENT}/mem', 'rb')",
    "root of the parent": "return os.listdir(f'/proc/{PARENT}/root')",
    "folder of the parent": "return os.listdir(f'/proc/{PARENT}/cwd')",
    "files open in the parent": "return os.listdir(f'/proc/{PARENT}/fd')",
    "processes": "return os.listdir('/proc')",
    "see the parent": "os.kill(PARENT, 0); return 'it is there'",
    "cgroups": "return os.listdir('/sys/fs/cgroup')",
    "settings of the kernel": "return open('/proc/sys/kernel/hostname').read()",
    "devices": "return set(os.listdir('/dev')) - {'null'}",
    "shared memory of the machine": "return open('/dev/shm/sandbox', 'w').write('x')",
    "installed packages": "sys.path.append(PACKAGES); import numpy; return numpy.__name__",
    "shell": "return subprocess.run(['/bin/sh', '-c', 'echo x'], capture_output=True).stdout",
    "listening server by TCP": "return socket.create_connection(('127.0.0.1', PORT), 1)",
    "datagram by UDP": "return socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
    "server of a path": "s = socket.socket(socket.AF_UNIX); s.connect(OUTSIDE + '/server'); return s",
    "server of an abstract name": "s = socket.socket(socket.AF_UNIX); s.connect(ABSTRACT); return s",
    "interfaces of the network": "return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "address that it would be called by": "return open('/etc/hosts').read()",
    "socket by its number": "return call({'x86_64': 41, 'aarch64': 198}[os.uname().machine], 2, 1, 0)",
    "segment of shared memory": "n = libc.shmget(0, 4096, 0o1600); return n >= 0 and libc.shmctl(n, 0, None) == 0",
    "queue of messages": "n = libc.msgget(0, 0o1600); return n >= 0 and libc.msgctl(n, 0, None) == 0",
}

# Attempts that could do harm outside the sandbox, or need privileges there.
FORBIDDEN = {
    "name of a host": "return socket.gethostbyname('example.org')",
    "sockets of virtual machines": "return socket.socket(40, socket.SOCK_STREAM)",
    "raw sockets": "return socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "end the parent": "os.kill(PARENT, signal.SIGKILL); return 'killed'",
    "end the parent's group": "os.killpg(PARENT, signal.SIGKILL); return 'killed'",
    "trace the first process": "return libc.ptrace(16, 1, 0, 0) == 0",
    "trace its child": """\
    child = os.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, '-S', '-c', 'pass'])
    return libc.ptrace(16, child, 0, 0) == 0""",
    "read a process's memory": "return call({'x86_64': 310, 'aarch64': 270}[os.uname().machine], 1, 0, 0, 0, 0, 0)",
    "mount": "return libc.mount(b'tmpfs', b'/folder', b'tmpfs', 0, None) == 0",
    "mount what is there again, to write": "return libc.mount(None, b'/lib', None, 32 | 4096, None) == 0",
    "mount /proc": "return libc.mount(b'proc', b'/folder', b'proc', 0, None) == 0",
    "unmount": "return libc.umount2(b'/folder', 2) == 0",
    "other root": "os.chroot('.'); return 'a root'",
    "other namespaces": "return libc.unshare(0x10000000) == 0",
    "other namespaces by clone": "return call({'x86_64': 56, 'aarch64': 220}[os.uname().machine], 1 << 28, 0, 0, 0, 0)",
    "other namespaces by clone3": "return call(435, 0, 0)",
    "be root": "os.setuid(0); return 'root'",
    "be in root's group": "os.setgid(0); return 'root'",
    "be in other groups": "os.setgroups([0]); return 'groups'",
    "keep a right": "return libc.prctl(47, 2, 21, 0, 0) == 0 or libc.prctl(23, 21, 0, 0, 0) > 0",
    "write a disk": "return open('/dev/vda', 'wb') or open('/dev/sda', 'wb')",
    "make a device": "os.mknod('disk', 0o60600, os.makedev(8, 0)); return 'a device'",
    "write the memory of the machine": "return open('/dev/mem', 'wb')",
    "write the kernel's settings": "return open('/proc/sys/kernel/core_pattern', 'w')",
    "write a cgroup": "return open('/sys/fs/cgroup/cgroup.procs', 'w')",
    "type into the terminal": "return open('/dev/tty', 'w')",
    "change Python's own library": "return open(os.__file__, 'a')",
    "change Python's own library's rights": "os.chmod(os.__file__, 0o777); return 'rights'",
    "put a file in the root": "return open('/left', 'w')",
    "set the clock": "time.clock_settime(time.CLOCK_REALTIME, 0); return 'a time'",
    "name the machine": "socket.sethostname('mine'); return 'a name'",
    "go before others": "os.nice(-5); return 'a place'",
    "keys of the kernel": "return call({'x86_64': 250, 'aarch64': 219}[os.uname().machine], 0, -3, 1)",
    "programs in the kernel": "return call({'x86_64': 321, 'aarch64': 280}[os.uname().machine], 0, 0, 0)",
    "rings of the kernel": "return call(425, 8, 0)",
    "tell the sandbox what came of it": """\
    for number in range(3, 64):
        try:
            os.write(number, b'returned 0\\n')
            return number
        except OSError as error:
            assert error.errno == errno.EBADF""",
}

# Attempts to exhaust a resource.
GREEDY = {
    "memory by request": "return bytearray(2**30)",
    "memory that is mapped": "return mmap.mmap(-1, 2**30)",
    "memory in a file": "f = os.memfd_create('f'); os.ftruncate(f, 2**30); return f",
    "memory in the stack of threads": "threading.stack_size(2**29); threading.Thread(target=print).start(); return 1",
    "large file": "return open('large', 'wb').write(bytes(2**23))",
    "full disk": "return [open(str(n), 'wb').write(bytes(2**18)) for n in range(100)]",
    "many files": "return [open(str(n), 'wb').close() for n in range(5000)]",
    "many open files": "return [open('code.py') for n in range(1000)]",
    "many processes": "return [os.fork() or time.sleep(9) for _ in range(100)]",
    "many threads": "return [threading.Thread(target=time.sleep, args=[9], daemon=True).start() for _ in range(100)]",
}
LIMITS = {"RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_NPROC"}


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text("a secret")
    return folder


@pytest.fixture
def folder(tmp_path, outside) -> Path:
    (tmp_path / "code.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "brought").symlink_to(outside / "secret")
    return tmp_path


@pytest.fixture(scope="module")
def servers(outside):
    """Listen in the parent process on a port and on an abstract socket name."""
    abstract = f"\0sandbox-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as by_path,
        socket.socket(socket.AF_UNIX) as by_name,
    ):
        for server, name in ((by_path, str(outside / "server")), (by_name, abstract)):
            server.bind(name)
            server.listen()
        yield {"port": tcp.getsockname()[1], "abstract": abstract}


@pytest.fixture(scope="module")
def written(outside, servers):
    packages = str(Path(numpy.__file__).parents[1])
    given = dict(outside=str(outside), parent=os.getpid(), packages=packages, **servers)
    return lambda code: ATTEMPT.format(code="    " + code.replace("\n", "\n    "), **given)


def one_after_another(programs: list[str]) -> str:
    """Return a program that runs other programs, each in its own process."""
    runs = "".join(
        f"if os.fork() == 0:\n  try:\n    exec({program!r}, {{}})\n    sys.stdout.flush()\n"
        "  finally:\n    os._exit(0)\nos.wait()\n"
        for program in programs
    )
    return f"import ctypes, mmap, os, pathlib, resource, shutil, socket, subprocess, sys, threading\n{runs}"


def held(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the permissions and contents of a folder's files."""
    return {path.name: (path.stat().st_mode, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def attempted(written, outside, tmp_path_factory) -> dict[str, str]:
    """Run all attempts except the greedy ones in one sandbox; return their outcomes."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "brought").symlink_to(outside / "secret")
    attempts = HARMLESS | FORBIDDEN
    before = held(outside)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", "my token")
        program = one_after_another([written(code) for code in attempts.values()])
        (folder / "attempts.py").write_text(program)
        outcome = run_python(folder, ["attempts.py"], Limits(seconds=60.0))
    assert held(outside) == before
    assert sorted(path.name for path in folder.iterdir()) == ["attempts.py", "brought"]
    return dict(zip(attempts, outcome.output.splitlines(), strict=True))


@pytest.mark.parametrize("name", HARMLESS | FORBIDDEN)
def test_no_way_leads_out(name, attempted):
    assert attempted[name].startswith("refused"), attempted[name]


@pytest.mark.parametrize("name", GREEDY)
def test_no_program_takes_more_than_its_share(name, written, folder):
    outcome = run_python(folder, ["-c", written(GREEDY[name])])
    said = outcome.output.splitlines()
    assert said, outcome
    assert all(line.startswith("refused") for line in said), outcome.output


def test_the_harmless_ways_lead_somewhere_without_a_sandbox(written, folder, monkeypatch):
    """This shows that the sandbox, rather than a bug in the attempts, causes the refusals."""
    monkeypatch.setenv("SECRET", "my token")
    program = one_after_another([written(code) for code in HARMLESS.values()])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], cwd=folder, capture_output=True, text=True)
    Path("/dev/shm/sandbox").unlink()
    said = dict(zip(HARMLESS, done.stdout.splitlines(), strict=True))
    assert done.stderr == ""
    assert {name: line for name, line in said.items() if not line.startswith("got at")} == {}


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_limits_cannot_be_raised(name, folder):
    code = f"import resource as r\nr.setrlimit(r.{name}, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
    outcome = run_python(folder, ["-c", code])
    assert outcome.returncode == 1
    assert "not allowed to raise maximum limit" in outcome.output


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "time.sleep(60)",
        "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15, 24)]\nwhile True: pass",
        "for n in (9, 2, 19):\n  try: os.kill(1, n)\n  except PermissionError: pass\ntime.sleep(60)",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "while True:\n  try: os.fork()\n  except OSError: pass",
        "a = 9 ** 9 ** 9",
    ],
    ids=["loop", "sleep", "deaf", "against the first process", "catches everything", "fork bomb", "in C"],
)
def test_its_time_ends(code, folder):
    outcome = run_python(folder, ["-c", f"import os, signal, time\n{code}"], Limits(seconds=0.4))
    assert outcome.timed_out, outcome
    assert processes_of(str(folder)) == []


@pytest.mark.parametrize("ends", ["pass", "time.sleep(60)"], ids=["after its end", "after its time"])
@pytest.mark.parametrize(
    "leave",
    ["os.fork()", "os.fork() or os.setsid() or os.fork()", "os.fork() or signal.signal(15, signal.SIG_IGN)"],
    ids=["child", "daemon", "deaf child"],
)
def test_nothing_survives(leave, ends, folder):
    token = f"survivor {leave} {ends} {os.getpid()}"
    code = f"import os, signal, time  # {token}\nmine = os.getpid()\n{leave}\n"
    code += f"if os.getpid() != mine: time.sleep(60)\nprint('on')\n{ends}"
    outcome = run_python(folder, ["-c", code], Limits(seconds=1.0))
    assert "on" in outcome.output
    assert processes_of(token) == []


def processes_of(token: str) -> list[str]:
    """Return the other processes of the machine whose command line contains a text."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_text()
        except OSError:  # the process has ended
            continue
        if token in line and process.name != str(os.getpid()):
            found.append(line)
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_is_killed_takes_its_programs_with_it(folder):
    """Even SIGKILL to the sandbox's caller leaves no process running."""
    token = f"orphan {os.getpid()}"
    caller = os.fork()
    if caller == 0:
        run_python(folder, ["-c", f"import time  # {token}\ntime.sleep(60)"], Limits(seconds=60.0))
        os._exit(0)
    try:
        wait_until(lambda: len(processes_of(token)) == 1)
    finally:
        os.kill(caller, signal.SIGKILL)
        os.waitpid(caller, 0)
    wait_until(lambda: not processes_of(token))


def wait_until(condition) -> None:
    for _ in range(400):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to be")


def test_a_flood_of_output_is_cut(folder):
    outcome = run_python(folder, ["-c", "while True: print('x' * 1000)"], Limits(output=5000))
    assert len(outcome.output) == 5000
    assert outcome.returncode != 0


def test_programs_change_only_a_copy_of_the_folder(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "file").write_text("text")
    code = "import shutil, os\nshutil.rmtree('deep'); os.unlink('brought'); os.unlink('code.py')\nprint(os.listdir())"
    assert run_python(folder, ["-c", code]) == Outcome(0, "[]\n")
    assert (folder / "deep" / "er" / "file").read_text() == "text"
    assert (folder / "brought").is_symlink()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("from code import double\nprint(double(4))", "8\n"),
        ("import unittest, json, re, math, dataclasses, itertools, asyncio\nprint(json.dumps([1]))", "[1]\n"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'abc'))", "3\n"),
        ("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1)'])", "1\n"),
        ("import threading\nt = threading.Thread(target=print, args=[7]); t.start(); t.join()", "7\n"),
        ("import asyncio\nasync def f(): return 3\nprint(asyncio.run(f()))", "3\n"),
        ("import hashlib, ssl, sqlite3, decimal, ctypes, zlib\nprint(zlib.crc32(b'a'))", "3904355907\n"),
        ("import sys\nprint(repr(sys.stdin.read()))", "''\n"),
        ("import os\nprint(len(os.urandom(8)), os.getpid() > 1)", "8 True\n"),
        ("print('ä', sorted({'b', 'a'}), __debug__)", "ä ['a', 'b'] True\n"),
        ("open('new', 'w').write('x'); print(open('new').read(), open('/dev/null', 'w').write('y'))", "x 1\n"),
    ],
    ids=["module", "imports", "temporary", "process", "thread", "asyncio", "C", "input", "random", "text", "files"],
)
def test_ordinary_programs_work(code, said, folder):
    (folder / "run.py").write_text(code)
    assert run_python(folder, ["run.py"]) == Outcome(0, said)


def test_errors_are_reported(folder):
    outcome = run_python(folder, ["-c", "import os, sys\nprint('said')\nsys.stdout.flush()\nos._exit(3)"])
    assert outcome == Outcome(3, "said\n")
    outcome = run_python(folder, ["-c", "1 / 0"])
    assert outcome.returncode == 1
    assert "ZeroDivisionError" in outcome.output
    assert run_python(folder, ["-c", "import os; os.abort()"]).returncode == -6


def test_many_threads_may_run_programs_at_once(folder):
    outcomes: list[Outcome] = []
    threads = [
        threading.Thread(target=lambda n=n: outcomes.append(run_python(folder, ["-c", f"print({n})"])))
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.output for outcome in outcomes) == ["0\n", "1\n", "2\n", "3\n"]


def test_without_isolation_nothing_runs_and_the_error_gives_the_reason(folder, monkeypatch):
    """The test creates this situation inside a sandbox, which cannot contain another one."""
    (folder / "jail.py").write_text(Path(jail.__file__).read_text())
    inner = run_python(
        folder, ["-c", "import jail\ntry: jail.keep({})\nexcept OSError as error: print('failed', error)"]
    )
    assert inner.output == "failed [Errno 1] clone: Operation not permitted\n"
    keeper = folder / "keeper.py"
    keeper.write_text(f"print({inner.output!r})")
    monkeypatch.setattr(jail, "__file__", str(keeper))
    with pytest.raises(SandboxError, match=r"cannot be built, .* clone: Operation .*user\.max_user_namespaces"):
        run_python(folder, ["-c", "print(1)"])


def test_a_program_that_cannot_begin_is_no_program_that_ended_well(folder, monkeypatch):
    monkeypatch.setattr(sandbox, "_resource_limits", lambda limits: {"RLIMIT_PATIENCE": 1})
    with pytest.raises(SandboxError, match=r"cannot be built, AttributeError.*RLIMIT_PATIENCE"):
        run_python(folder, ["-c", "pass"])


def test_limits_that_training_runs_under_hold_for_programs(folder):
    program = f"""
import resource
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
from hybridmem.sandbox.run import Limits, run_python
said = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU)[1])"
print(run_python({str(folder)!r}, ["-c", said], Limits(seconds=300.0)).output)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "30"


def test_other_systems_are_refused(folder, monkeypatch):
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Darwin")
    with pytest.raises(SandboxError, match=r"no sandbox on Darwin.*it needs Linux 5.12"):
        run_python(folder, ["-c", "print(1)"])


def test_settings_that_cannot_be(folder):
    with pytest.raises(ValueError, match=r"seconds=0\.0 must be above 0"):
        Limits(seconds=0.0)
    with pytest.raises(ValueError, match="memory"):
        Limits(memory=1000)
    (folder / "large").write_bytes(bytes(2**20))
    with pytest.raises(ValueError, match="disk=1000000 is too small for a copy"):
        run_python(folder, ["-c", "print(1)"], Limits(disk=10**6))
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        run_python(folder / "code.py", ["-c", "print(1)"])
