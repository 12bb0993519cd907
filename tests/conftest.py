"""Setup of the suite: Triton's interpreter, a single thread and seeded random numbers.

Triton chooses its interpreter when kernels are declared, so this must run before any test imports them. A second
thread costs more than it gains on tiny tensors. Every test draws the same numbers in any order and on any number of
processes.
"""

import os
import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded_on_one_thread(request: pytest.FixtureRequest) -> None:
    torch.set_num_threads(1)  # benchmarks change it, and a process forked later would hang
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
