"""Kernels run in Triton's interpreter, which it decides on where they are declared."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
