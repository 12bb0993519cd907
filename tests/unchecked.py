"""Tests of compiled graphs in a process without shape checks, which torch.compile cannot trace."""

import subprocess
import sys
from pathlib import Path

import pytest

import hybridmem_kernels

ROOT = Path(__file__).parents[1]
CHECKED = hasattr(hybridmem_kernels.memory_scan, "__wrapped__")

without_shape_checks = pytest.mark.skipif(CHECKED, reason="runs in a process without shape checks")
with_shape_checks = pytest.mark.skipif(not CHECKED, reason="this is the process without shape checks")


def passes_without_shape_checks(file: str) -> None:
    """Run the tests of `file` that have the mark above."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
