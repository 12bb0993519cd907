"""Set-up of a sandbox before its program starts; only the sandbox runs this script.

    training process ─ runs ─> keeper ─ clone ─> first process of the new namespaces ─ fork ─> the program
                               (the time limit)  (builds the file system, waits)             (limits, no rights)

The program sees Python's own files, read-only, and an in-memory copy of the folder. When the keeper ends, so do all
processes in the sandbox: the kernel kills all processes of a namespace together with its first one.
"""

# This script starts thousands of times per training run. It avoids imports that take more than a millisecond, such as
# json, signal and typing.
import ctypes
import errno
import marshal
import os
import resource
import select
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of CALLS, and seccomp's architecture code
CALLS = {"clone": (56, 220), "clone3": (435, 435), "mount_setattr": (442, 442), "pivot_root": (155, 41)}
# System calls that no program needs here: namespaces, mounts, other processes' memory, keys, sockets, and memory not
# covered by limits. The sandbox has no host files and no capabilities anyway, but these calls have had kernel bugs.
DENIED = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapon": (167, 224),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
NEW_NAMESPACES = 0x7E020000  # user, pid, network, mount, ipc, host name, cgroup
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 2, -100, 0x8000, 1, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
SECCOMP_FILTER = 2
SIGINT, SIGKILL, SIGCHLD, SIG_DFL = 2, 9, 17, 0
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
X32 = 0x40000000  # numbers of x86's other call table
OUTSIDER, NOBODY = 1, 65534  # the program's user inside, and the user outside if training runs as root
HOME = "/folder"
TELL = 62  # a copy of the pipe to the training process, closed when the program starts

libc = ctypes.CDLL(None, use_errno=True)


def keep(settings: dict) -> None:
    """Start the first process of new namespaces, and kill it when the program's time limit expires."""
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL)
    told, tell = os.pipe()
    begun, begins = os.pipe()
    first = _check("clone", _system_call("clone", NEW_NAMESPACES | SIGCHLD, 0, 0, 0, 0))
    if first == 0:
        os.close(tell)
        _attempt(begin, settings, told, begins)
    os.close(told)
    os.close(begins)
    _name_users(first)
    os.write(tell, b"go")
    os.read(begun, 1)  # returns once all other ends are closed, when the program starts
    ready = select.poll()
    ready.register(os.pidfd_open(first))
    overran = not ready.poll(1000 * settings["seconds"])
    if overran:
        os.kill(first, SIGKILL)
    os.waitpid(first, 0)
    if overran:
        report("overran")


def begin(settings: dict, told: int, begins: int) -> None:
    """Run the first process: build the file system, then run the program and exit with it."""
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL)
    libc.signal(SIGINT, SIG_DFL)  # Python's own handler would let the program interrupt this
    if os.read(told, 2) != b"go":  # the keeper has died
        os._exit(1)
    build(settings)
    program = os.fork()
    if program == 0:
        _attempt(become, settings)
    os.close(begins)
    status = 0
    ended = 0
    while ended != program:
        ended, status = os.wait()
    report(f"returned {os.waitstatus_to_exitcode(status)}")


def build(settings: dict) -> None:
    """Build an in-memory root with read-only mounts of Python's files and a copy of the folder, and nothing else."""
    os.umask(0o022)
    folder = settings["folder"]
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")  # a mount point that is known to exist
    os.mkdir(f"{folder}/old")
    os.chdir(folder)
    _check("pivot_root", _system_call("pivot_root", b".", b"old"))
    os.chdir("/")
    for path, source in settings["readable"]:
        _bind(f"/old{source}", path)
    for path in settings["hidden"]:
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "size=4k")
    os.mkdir(HOME)
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    mount("tmpfs", HOME, "tmpfs", MS_NOSUID | MS_NODEV, f"size={settings['disk']},nr_inodes=4096,mode=0777")
    os.umask(0)  # the program may change the copied files
    try:
        copy(f"/old{folder}", HOME)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        report("full")
    _check("umount2", libc.umount2(b"/old", MNT_DETACH))
    os.rmdir("/old")
    for path in ("/", *(path for path, _ in settings["readable"])):
        recursive = 0 if path == "/" else AT_RECURSIVE  # all mounts except the copy
        _check(
            "mount_setattr",
            _system_call("mount_setattr", AT_FDCWD, path.encode(), recursive, attributes, len(attributes)),
        )


def become(settings: dict) -> None:
    """Become the program, with limits, no capabilities, fewer system calls and a clean environment."""
    os.setsid()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0, inheritable=True)
    os.dup2(settings["output"], 1, inheritable=True)
    os.dup2(settings["output"], 2, inheritable=True)
    os.set_inheritable(settings["output"], False)
    os.chdir(HOME)
    for name, value in settings["limits"].items():
        kind = getattr(resource, name)
        most = resource.getrlimit(kind)[1]  # limits of the training process cannot be raised
        limit = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (limit, limit))
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    if os.getuid() != OUTSIDER:
        os.setgroups([])
        os.setresgid(OUTSIDER, OUTSIDER, OUTSIDER)
        os.setresuid(OUTSIDER, OUTSIDER, OUTSIDER)
    _check("no_new_privs", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _deny_calls()
    os.execve(settings["command"][0], settings["command"], settings["environment"])


def copy(source: str, target: str) -> None:
    """Copy folders, files and symbolic links, without following links; skip everything else."""
    for entry in os.scandir(source):
        path = f"{target}/{entry.name}"
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), path)
        elif entry.is_dir():
            os.mkdir(path)
            copy(entry.path, path)
        elif entry.is_file():
            with open(entry.path, "rb") as read, open(path, "wb") as write:
                write.write(read.read())


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Call mount(2)."""
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    _check(f"mount {target}", libc.mount(*texts[:3], ctypes.c_ulong(flags), texts[3]))


def report(said: str) -> None:
    """Send a line to the training process, which reads only the first one."""
    os.write(TELL, said.encode() + b"\n")


def _name_users(first: int) -> None:
    """Map the namespace's users to users outside: root becomes nobody, other users can only map to themselves."""
    if os.geteuid():
        _write(f"/proc/{first}/setgroups", "deny")
    for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        users = f"{OUTSIDER} {own} 1" if os.geteuid() else f"0 0 1\n{OUTSIDER} {NOBODY} 1"
        _write(f"/proc/{first}/{name}", users)


def _bind(source: str, path: str) -> None:
    folder = path if os.path.isdir(source) else os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    if folder != path:
        _write(path, "")
    mount(source, path, None, MS_BIND | MS_REC)


def _deny_calls() -> None:
    column, machine = MACHINES[os.uname().machine]
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, machine), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    if column == 0:
        rules += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    for numbers in DENIED.values():
        rules += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, REFUSE | errno.EPERM)]
    # Filters cannot inspect the flags of clone3; without it, programs fall back to clone.
    rules += [(EQUAL, 0, 1, CALLS["clone3"][column]), (RETURN, 0, 0, REFUSE | errno.ENOSYS)]
    rules += [(EQUAL, 0, 3, CALLS["clone"][column]), (LOAD, 0, 0, 16), (ANY_BIT, 0, 1, NEW_NAMESPACES)]
    rules += [(RETURN, 0, 0, REFUSE | errno.EPERM), (RETURN, 0, 0, ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HP", len(rules), ctypes.addressof(code))
    _check("seccomp", libc.prctl(PR_SET_SECCOMP, SECCOMP_FILTER, program, 0, 0))


def _attempt(step: "Callable[..., None]", *arguments: object) -> None:
    """Run a process's step and exit, so that control never returns to the parent's code."""
    try:
        step(*arguments)
    except BaseException as error:
        report(f"failed {type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _system_call(name: str, *arguments: object) -> int:
    column, _ = MACHINES[os.uname().machine]
    passed = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return libc.syscall(ctypes.c_long(CALLS[name][column]), *passed)


def _check(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    os.dup2(1, TELL, inheritable=False)
    try:
        keep(marshal.load(sys.stdin.buffer))
    except OSError as error:
        report(f"failed {error}")
