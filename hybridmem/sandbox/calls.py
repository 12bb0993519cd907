"""Results of function calls in untrusted programs, executed in a sandbox."""

import json
import marshal
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from .run import Limits, run_python

RAISED, UNFINISHED = "raises ", "does not end"
ENOUGH = Limits(seconds=5.0)  # wall-clock time, sufficient on a busy machine; CPU time limits end infinite loops
# Each program has its own process, so that programs cannot affect each other. Their own output is discarded.
PROGRAM = """
import json, marshal, os, resource, signal, sys

class Overran(BaseException):
    pass

def overran(*_):
    raise Overran

def returned(call, namespace):
    try:
        return repr(eval(call, namespace))[:1000]
    except Overran:
        raise
    except BaseException as error:
        return f"raises {type(error).__name__}: {error}"[:100]

def results(source, calls, seconds):
    namespace, said = {"__name__": "code"}, []
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        exec(compile(source, "code", "exec"), namespace)
        for call in calls:
            said.append(returned(call, namespace))
    except Overran:
        pass
    except BaseException as error:
        said = [f"raises {type(error).__name__}: {error}"[:100]] * len(calls)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return said + ["does not end"] * (len(calls) - len(said))

with open("programs.marshal", "rb") as file:
    programs, seconds = marshal.load(file)
signal.signal(signal.SIGPROF, overran)
tell = os.fdopen(os.dup(1), "w")
nothing = os.open("/dev/null", os.O_WRONLY)
os.dup2(nothing, 1)
os.dup2(nothing, 2)
for number, (sources, calls) in enumerate(programs):
    child = os.fork()
    if child == 0:
        cpu = min(int(2 + seconds * len(sources)), resource.getrlimit(resource.RLIMIT_CPU)[1])
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        print(json.dumps([number, [results(source, calls, seconds) for source in sources]]), file=tell, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def run_calls(
    programs: Sequence[tuple[Sequence[str], Sequence[str]]],
    files: Mapping[str, str] | None = None,
    seconds: float = 0.25,
    limits: Limits = ENOUGH,
) -> list[list[list[str]]]:
    """Run each program's calls on each of its sources, and return the repr of every result.

    The result is "raises " followed by the error if a call raises, and "does not end" if it takes too long.

    Args:
        programs: sources, and the calls to run on each of them, as Python expressions.
        files: contents of the working folder by name.
        seconds: CPU time for all calls of a source together.
        limits: limits of the whole run.

    Raises:
        SandboxError: the system cannot isolate programs.
    """
    plain = [(list(sources), list(calls)) for sources, calls in programs]
    with TemporaryDirectory(prefix="calls-") as folder:
        for name, text in (files or {}).items():
            Path(folder, name).write_text(text)
        Path(folder, "programs.marshal").write_bytes(marshal.dumps((plain, seconds)))
        output = run_python(folder, ["-c", PROGRAM], limits).output
    said = [[[UNFINISHED] * len(calls) for _ in sources] for sources, calls in plain]
    for line in output.splitlines():
        number, results = _told(line, plain)
        if number is not None:
            said[number] = results
    return said


@lru_cache(maxsize=4096)
def results_of(files: tuple[tuple[str, str], ...], path: str, calls: tuple[str, ...]) -> tuple[str, ...]:
    """Return the results of calls to functions in a file of a folder, with caching.

    Args:
        files: names and texts of the folder's files.
        path: the file whose functions are called.
        calls: Python expressions.
    """
    folder = dict(files)
    return tuple(run_calls([([folder[path]], calls)], folder)[0][0])


def _told(line: str, programs: list[tuple[list[str], list[str]]]) -> tuple[int | None, list[list[str]]]:
    """Parse a line of output into (program number, results); reject lines forged by the untrusted code."""
    try:
        number, results = json.loads(line)
        sources, calls = programs[number]
        shape = [len(said) for said in results]
    except (ValueError, TypeError, IndexError):
        return None, []
    texts = all(isinstance(text, str) for said in results for text in said)
    return (number, results) if texts and shape == [len(calls)] * len(sources) else (None, [])
