"""One thread: on tiny tensors a second one costs more than it gives, and other work shares the cores."""

import torch

torch.set_num_threads(1)
