"""Check for unprivileged namespaces on this machine, independent of the sandbox under test."""

import subprocess
import sys

import pytest

# A user namespace and a mount namespace with writable mounts.
PROBE = """
import ctypes, sys
libc = ctypes.CDLL(None)
sys.exit(libc.unshare(0x10020000) or libc.mount(None, b"/", None, ctypes.c_ulong(0x44000), None))
"""
HAS_NAMESPACES = sys.platform == "linux" and subprocess.run([sys.executable, "-ISc", PROBE]).returncode == 0
needs_sandbox = pytest.mark.skipif(
    not HAS_NAMESPACES, reason="no namespaces for everyone here (docs/agents.md): code cannot be run in isolation"
)
