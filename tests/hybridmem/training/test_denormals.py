import subprocess
import sys

# In a process of its own: the setting stays with its threads.
PROGRAM = """
import torch
from hybridmem.training.denormals import flush_denormals
assert flush_denormals()
torch.set_num_threads(2)
tiny = torch.full((2_000_000,), 1e-30)
assert not (tiny * 1e-10).any(), "a thread of an operation keeps denormal numbers"
small = torch.full((2_000_000,), 1e-30, requires_grad=True)
(small * 1e-10).sum().backward()
(gradient,) = torch.autograd.grad((small * 1e-20).sum() * 1e-20, small)
assert not gradient.any(), "the backward pass keeps denormal numbers"
"""


def test_operations_of_all_threads_round_denormal_numbers_to_zero():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
