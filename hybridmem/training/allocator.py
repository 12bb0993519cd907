"""How the C library hands out memory, for processes that train on the CPU."""

import ctypes
import os
import sys

MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks instead of returning them: a step then reuses its pages.

    Otherwise every large temporary is mapped, zeroed by the kernel and unmapped again, step after step. The
    process's peak memory stays the same. Does nothing where MALLOC_ variables are set or the C library is another;
    returns whether it did something.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in MALLOPT.values())
