"""Triton's interpreter, which it decides on where kernels are declared, whichever test imports them first.

And one thread: on tiny tensors a second one costs more than it gives, and other work shares the cores.
"""

import os

import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
