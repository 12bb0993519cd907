"""Whether this machine lets everyone make namespaces, found without the sandbox that is tested."""

import subprocess
import sys

import pytest

# A namespace for users and one for mounts, in which what is mounted can be changed.
PROBE = """
import ctypes, sys
libc = ctypes.CDLL(None)
sys.exit(libc.unshare(0x10020000) or libc.mount(None, b"/", None, ctypes.c_ulong(0x44000), None))
"""
HAS_NAMESPACES = sys.platform == "linux" and subprocess.run([sys.executable, "-ISc", PROBE]).returncode == 0
needs_sandbox = pytest.mark.skipif(
    not HAS_NAMESPACES, reason="no namespaces for everyone here (docs/agents.md): code cannot be run in isolation"
)
