"""Settings of every test: Triton's interpreter, no network, one thread, random numbers of its own.

Triton reads the environment where kernels are declared, huggingface_hub where it is imported, so both are set first.
On tiny tensors a second thread costs more than it gives. Every test draws the same numbers in any order. The garbage
collector ignores the modules, which would take it half a second each time.
"""

import gc
import importlib.util
import os
import random
import zlib
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from tests.first_calls import limited, start_test

gc.disable()
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the tests' wrong names are not looked up, again and again
settings.register_profile("repeatable", derandomize=True, deadline=None)  # timings decide no test
settings.load_profile("repeatable")
if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    from tests.interpreter import quicken

    quicken()
jaxtyping.jaxtyped = limited(jaxtyping.jaxtyped)  # decorates the functions of modules imported from here on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: a process that began one last would keep the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Exclude all that was imported from garbage collection, also in forked processes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # compiling a graph leaves so many objects that every 700th starts too many rounds
    gc.enable()


def pytest_sessionfinish() -> None:
    """Include the modules again, because Triton's bindings report objects that the process's end does not collect."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Check the shapes of functions' first calls in this test, its fixtures included."""
    start_test()


@pytest.fixture(autouse=True)
def seeded_on_one_thread(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(1)  # benchmarks change it, and a process forked later would hang
    torch.set_flush_denormal(False)  # benchmarks set it, and hypothesis refuses to draw floats then
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries draw from it
    torch.manual_seed(seed)


# Variables that launchers set for distributed processes, and that Lightning writes into this process's environment.
LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Destroy the process group that a distributed strategy left, before a later test's processes inherit it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in LAUNCHED:
        os.environ.pop(name, None)
