"""What the benchmarks share: calls timed in turn, and how much memory a process takes."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round; what disturbs the machine for a while disturbs all of them.

    On one thread these are seconds of the processor: other work on the machine hardly changes them.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for call in calls.values():
        call()  # what is set up once does not count
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, baseline: str) -> float:
    """How many times as long as the baseline a call takes: the median over rounds."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[baseline], strict=True))


def resident_megabytes() -> float:
    """The process's resident set."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_megabytes() -> float:
    """The highest that the resident set has been since the process began."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10
