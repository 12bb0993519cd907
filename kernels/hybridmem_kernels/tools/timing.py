"""Timings of the operators in PyTorch and Triton, with the head counts of configs/pretrain."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from ..attention_divergence import attention_divergence
from ..memory_mlp_scan import memory_mlp_scan
from ..memory_scan import memory_scan

BATCH, DIM, WINDOW = 4, 64, 512
HEADS = (12, 24)  # as in configs/pretrain/170m.yaml and 760m.yaml
NUM_CALLS = 4  # the length of the list from `calls`


@dataclass(frozen=True)
class Speed:
    """Milliseconds per call of an operator, and its peak memory in addition to its inputs (0 without a GPU)."""

    operator: str
    heads: int
    time: int
    call: str
    backend: str
    milliseconds: float
    peak_mb: float


@dataclass(frozen=True)
class Call:
    """One timed call: `run` takes a backend, and `leaves` get gradients; without leaves only the forward is timed."""

    operator: str
    heads: int
    time: int
    run: Callable[[str], Tensor]
    leaves: Sequence[Tensor]


def benchmark(time: int, device: str) -> list[Speed]:
    """Time every operator on bfloat16 tokens, forward and backward, and a decoding step."""
    found = []
    for heads in HEADS:
        for call in calls(BATCH, heads, time, device):
            for backward in (False, True) if call.leaves else (False,):
                found += [measure(call, backend, backward) for backend in ("torch", "triton")]
    return found


def calls(batch: int, heads: int, time: int, device: str) -> list[Call]:
    """List the operators' calls as in a model: float32 gates, bounded gradients, a window."""
    tokens = [torch.randn(batch, heads, time, DIM, device=device) for _ in range(3)]
    q, k, v = F.normalize(tokens[0], dim=-1).bfloat16(), F.normalize(tokens[1], dim=-1).bfloat16(), tokens[2].bfloat16()
    alpha, eta, theta = (torch.rand(batch, heads, time, device=device) * top for top in (0.05, 0.8, 0.2))
    weights = [torch.randn(heads, DIM, DIM, device=device) / 16 for _ in range(2)]
    q_ref = q.roll(1, 2)
    scan: dict[str, Any] = dict(q=q, k=k, v=v, alpha=alpha, eta=eta, theta=theta)
    token: dict[str, Any] = {name: x[:, :, :1].contiguous() for name, x in scan.items()}
    _, state = memory_scan(**token)

    def linear(backend: str) -> Tensor:
        return memory_scan(**scan, backend=backend)[0]

    def deep(backend: str) -> Tensor:
        return memory_mlp_scan(**scan, weights=weights, max_grad_norm=1.0, backend=backend)[0]

    def divergence(backend: str) -> Tensor:
        return attention_divergence(q, k, q_ref, k, window=WINDOW, window_ref=WINDOW, backend=backend).divergence

    def decode(backend: str) -> Tensor:
        return memory_scan(**token, state=state, backend=backend)[0]

    return [
        Call("memory_scan", heads, time, linear, list(scan.values())),
        Call("memory_mlp_scan", heads, time, deep, [*scan.values(), *weights]),
        Call("attention_divergence", heads, time, divergence, (q, k)),
        Call("memory_scan", heads, 1, decode, ()),
    ]


def once(call: Call, backend: str, backward: bool) -> Any:
    """Run the call, with or without gradients."""
    if backward:
        inputs = [leaf.requires_grad_() for leaf in call.leaves]
        return torch.autograd.grad(call.run(backend).float().sum(), inputs)
    with torch.no_grad():
        return call.run(backend)


def build(number: int, time: int, device: str) -> None:
    """Build the Triton kernels of the n-th call and store them in Triton's cache on disk."""
    call = calls(BATCH, HEADS[0], time, device)[number]
    for backward in (False, True) if call.leaves else (False,):
        once(call, "triton", backward)


def measure(call: Call, backend: str, backward: bool) -> Speed:
    """Measure and print time and memory of one call."""

    def run() -> Any:
        return once(call, backend, backward)

    run()  # build the kernels
    peak = _peak_megabytes(run)
    milliseconds = Timer("run()", globals=dict(run=run), num_threads=torch.get_num_threads()).blocked_autorange().median
    what = "forward and backward" if backward else "forward"
    speed = Speed(call.operator, call.heads, call.time, what, backend, milliseconds * 1e3, peak)
    figures = f"{speed.milliseconds:10.3f} ms{peak:10.1f} MB"
    print(f"{call.operator:22}{call.heads:4} heads{call.time:6} tokens  {what:22}{backend:8}{figures}", flush=True)
    return speed


def _peak_megabytes(run: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
