"""Shared measurements of the benchmarks: interleaved timings and the memory of a process."""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every call in every round, interleaved so that disturbances affect all calls alike.

    On one thread, this is CPU time, which other load on the machine hardly changes.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for call in calls.values():
        call()  # warm-up, not timed
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, baseline: str) -> float:
    """Return a call's time relative to the baseline, as the median over rounds."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[baseline], strict=True))


def resident_megabytes() -> float:
    """Return the resident set size of the process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_megabytes() -> float:
    """Return the peak resident set size since the process started."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10
