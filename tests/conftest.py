"""Triton's interpreter, which it decides on where kernels are declared, whichever test imports them first.

And one thread: on tiny tensors a second one costs more than it gives, and other work shares the cores.
Every test draws the same numbers whichever ran before it, on however many processes.
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
    torch.set_num_threads(1)  # benchmarks set others, with which a process that is forked later would hang
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the libraries underneath draw from it
    torch.manual_seed(seed)


# What launchers tell processes of one another, as Lightning writes it into this one's environment.
LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Strategies of several processes leave theirs behind, which processes that a later test starts would take over."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in LAUNCHED:
        os.environ.pop(name, None)
