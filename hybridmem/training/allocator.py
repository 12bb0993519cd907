"""glibc settings that speed up training on a CPU."""

import ctypes
import os
import sys

MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks, so that each step reuses the pages of the last one.

    By default, every large temporary is mapped, zeroed by the kernel and unmapped again in every step. Peak memory
    does not change. With another C library, or if any MALLOC_ variable is set, the function changes nothing.

    Returns:
        True if the settings were changed.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in MALLOPT.values())
