"""Cost estimates of Triton operators: launches, bytes and operations, and a lower bound on the time on GPUs.

    python -m hybridmem_kernels.tools.roofline [--write docs/kernels.md]

Launches and bytes are recorded from the operators themselves (recording.py). Each tensor argument of a kernel counts
once, as if repeated reads always hit the cache. Operations are counted for matrix products with the formulas below,
without the parts of tiles beyond the edge of a chunk, a window or a head.

The time of a kernel is at least the maximum of bytes / bandwidth and operations / peak. A kernel with fewer programs
than the GPU has multiprocessors reaches a proportionally smaller share of both. No estimate has been measured.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from ..attention_divergence.reference import AttentionPolicy
from ..attention_divergence.triton_autograd import attention_divergence_triton
from ..memory_mlp_scan.reference import initial_state
from ..memory_mlp_scan.triton_autograd import memory_mlp_scan_triton
from ..memory_scan.reference import empty_state
from ..memory_scan.triton_autograd import memory_scan_triton
from .recording import Launch, recorded

CONFIG = Path(__file__).parents[3] / "configs" / "pretrain" / "170m.yaml"
MARKS = ("<!-- roofline -->\n", "<!-- end of roofline -->\n")
LAUNCH = 4e-6  # seconds until the next kernel starts


class GPU(NamedTuple):
    """Data sheet of a GPU, with peaks for dense matrix products."""

    bandwidth: float  # bytes per second
    bf16: float  # operations per second
    tf32: float
    multiprocessors: int


GPUS = {
    "A100": GPU(2.04e12, 312e12, 156e12, 108),  # SXM, 80 GB
    "H100": GPU(3.35e12, 989e12, 495e12, 132),  # SXM
    "MI300X": GPU(5.3e12, 1307e12, 654e12, 304),
}


@dataclass(frozen=True)
class Shapes:
    """Sizes of a call with tokens in bfloat16."""

    batch: int
    heads: int
    time: int
    dim: int
    chunk: int
    widths: tuple[int, ...]  # of a deep memory
    window: int

    @classmethod
    def of(cls, path: Path) -> "Shapes":
        """Read the sizes of a training configuration, at depth 2 for a deep memory."""
        settings = yaml.safe_load(path.read_text())
        config, data = settings["model"]["init_args"]["config"], settings["data"]["init_args"]
        dim = config["memory_head_dim"]
        return cls(
            data["batch_size"],
            config["memory_heads"],
            data["sequence_length"],
            dim,
            config["memory_chunk_size"],
            (dim, dim * config.get("memory_expansion", 1), dim),
            config["attention_window"],
        )

    @property
    def chunks(self) -> int:
        """Number of chunks in all rows and heads."""
        return self.batch * self.heads * -(-self.time // self.chunk)

    @property
    def seen(self) -> int:
        """Return the number of visible (query, key) pairs in all rows and heads."""
        window = min(self.window, self.time)
        return self.batch * self.heads * (self.time * window - window * (window - 1) // 2)


def memory_scan_operations(shapes: Shapes) -> dict[str, int]:
    """Count the operations of each kernel for a state of dim × dim."""
    size, dim = shapes.chunk, shapes.dim
    squares, states = 2 * size**2 * dim, 2 * size * dim**2  # (size × size) · (size × dim), (size × dim) · (dim × dim)
    per_chunk = {
        "chunk_kernel": 2 * squares + _merges(size),
        "scan_kernel": 4 * states + squares,
        "output_kernel": 2 * states + squares,
        "seed_kernel": 2 * states + squares,
        "adjoint_kernel": 4 * states + squares,
        "mix_gradient_kernel": 4 * squares,
        "token_gradient_kernel": 6 * states + 3 * squares,
    }
    return {name: count * shapes.chunks for name, count in per_chunk.items()}


def _merges(size: int) -> int:
    """Count the operations of the blocked inverse, starting from blocks of 16."""
    widths = [16 * 2**n for n in range(size.bit_length()) if 16 * 2**n < size]
    return sum(size // (2 * width) * 2 * 2 * width**3 for width in widths)


def memory_mlp_scan_operations(shapes: Shapes) -> dict[str, int]:
    """Count the operations of each kernel."""
    size, layers = shapes.chunk, list(pairwise(shapes.widths))
    all_layers = sum(2 * size * rows * columns for rows, columns in layers)
    later = all_layers - 2 * size * layers[0][0] * layers[0][1]
    last = 2 * size * layers[-1][0] * layers[-1][1]
    pairs_in, pairs_out = (sum(2 * size**2 * layer[side] for layer in layers) for side in range(2))
    answers = sum(2 * size**2 * sum(layer) for layer in layers[:-1]) + 2 * (all_layers - last)
    per_chunk = {
        "scan_kernel": 3 * all_layers + later,
        "read_kernel": 2 * all_layers + pairs_in + pairs_out,
        "surprise_kernel": all_layers + later,
        "read_backward_kernel": answers + 2 * all_layers + 3 * pairs_in + 2 * pairs_out,
        "scan_backward_kernel": 8 * all_layers + 2 * later,
    }
    return {name: count * shapes.chunks for name, count in per_chunk.items()}


def attention_divergence_operations(shapes: Shapes) -> dict[str, int]:
    """Count the operations of each kernel for a reference with identical heads."""
    scores = 2 * shapes.seen * shapes.dim
    return {
        "log_sums_kernel": scores,
        "compare_kernel": 2 * scores,
        "slopes_kernel": 2 * scores,
        "grad_queries_kernel": 3 * scores,
        "grad_keys_kernel": 2 * scores,
    }


# Kernels whose operands are tokens multiply in bfloat16; states, errors and decays are multiplied in tf32.
IN_BF16 = (
    "chunk_kernel",
    "log_sums_kernel",
    "compare_kernel",
    "slopes_kernel",
    "grad_queries_kernel",
    "grad_keys_kernel",
)
Call = Callable[[Shapes], Tensor]


class ScanInputs(NamedTuple):
    """Tokens and gates, in the order of the operators' arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor

    @classmethod
    def of(cls, shapes: Shapes) -> "ScanInputs":
        """Create meta tensors."""
        lead = (shapes.batch, shapes.heads, shapes.time)
        tokens = [torch.empty(*lead, shapes.dim, dtype=torch.bfloat16, device="meta") for _ in range(3)]
        gates = [torch.empty(lead, device="meta") for _ in range(3)]
        return cls(*(x.requires_grad_() for x in (*tokens, *gates)))


def call_memory_scan(shapes: Shapes) -> Tensor:
    """Scan a whole text, starting from an empty memory."""
    inputs = ScanInputs.of(shapes)
    state = empty_state(inputs.q, inputs.v)
    return memory_scan_triton(**inputs._asdict(), state=state, document_ids=None, mask=None, chunk_size=shapes.chunk)[0]


def call_memory_mlp_scan(shapes: Shapes) -> Tensor:
    """Scan a whole text with bounded gradients."""
    matrices = pairwise(shapes.widths)
    weights = [torch.empty(shapes.heads, *size, device="meta", requires_grad=True) for size in matrices]
    state = initial_state(weights, shapes.batch, torch.float32)
    settings: dict[str, Any] = dict(document_ids=None, mask=None, chunk_size=shapes.chunk, max_grad_norm=1.0, even=True)
    inputs = ScanInputs.of(shapes)._asdict()
    return memory_mlp_scan_triton(**inputs, learned=weights, state=state, **settings)[0]


def call_attention_divergence(shapes: Shapes) -> Tensor:
    """Compare two policies within a window."""
    q, k, *_ = ScanInputs.of(shapes)
    policy = AttentionPolicy(q, k, shapes.dim**-0.5, shapes.window, 0)
    reference = AttentionPolicy(q.detach(), k.detach(), *policy[2:])
    return attention_divergence_triton(policy, reference, None, None, True, "jsd").divergence


OPERATORS: dict[str, tuple[Call, Callable[[Shapes], dict[str, int]]]] = {
    "memory_scan": (call_memory_scan, memory_scan_operations),
    "memory_mlp_scan": (call_memory_mlp_scan, memory_mlp_scan_operations),
    "attention_divergence": (call_attention_divergence, attention_divergence_operations),
}


@dataclass(frozen=True)
class Cost:
    """Cost of all launches of one kernel in one pass of a call."""

    operator: str
    backward: bool
    kernel: str
    launches: int
    programs: int  # per launch
    bytes: int
    operations: int

    def seconds(self, gpu: GPU) -> float:
        """Estimate a lower bound on the time."""
        peak = gpu.bf16 if self.kernel in IN_BF16 else gpu.tf32
        share = min(1.0, self.programs / gpu.multiprocessors)
        return self.launches * LAUNCH + max(self.bytes / gpu.bandwidth, self.operations / peak) / share


def costs(operator: str, shapes: Shapes) -> list[Cost]:
    """List the costs of all kernels of a forward, then of its backward."""
    call, operations = OPERATORS[operator]
    with recorded() as launches:
        out = call(shapes)
        forward = len(launches)
        out.sum().backward()
    found = []
    for backward, part in enumerate((launches[:forward], launches[forward:])):
        found += list(_by_kernel(operator, bool(backward), part, operations(shapes)))
    return found


def _by_kernel(operator: str, backward: bool, launches: Sequence[Launch], operations: dict[str, int]) -> Iterator[Cost]:
    """Group launches by kernel; launches for parts of a row share the kernel's operations."""
    names = dict.fromkeys(launch.kernel for launch in launches)
    for name in names:
        mine = [launch for launch in launches if launch.kernel == name]
        parts = 2 if name == "log_sums_kernel" else 1  # one per policy
        total = operations.get(name, 0) * parts
        programs = max(launch.programs for launch in mine)
        yield Cost(operator, backward, name, len(mine), programs, sum(launch.bytes for launch in mine), total)


def table(found: Sequence[Cost]) -> str:
    """Format costs as Markdown, with a sum after every pass."""
    names = ["operator", "pass", "kernel", "launches", "programs", "MB", "GFLOP", *(f"{gpu}, µs" for gpu in GPUS)]
    lines = [_row(names), _row(["---"] * len(names))]
    for (operator, backward), group in groupby(found, key=lambda cost: (cost.operator, cost.backward)):
        rows = list(group)
        what = "backward" if backward else "forward"
        for cost in rows:
            kernel = cost.kernel.removesuffix("_kernel")
            lines.append(_row([f"`{operator}`", what, f"`{kernel}`", cost.launches, cost.programs, *_figures([cost])]))
        lines.append(_row([f"`{operator}`", what, "**all**", sum(cost.launches for cost in rows), "", *_figures(rows)]))
    return "\n".join(lines) + "\n"


def _figures(found: Sequence[Cost]) -> list[str]:
    size, operations = sum(cost.bytes for cost in found), sum(cost.operations for cost in found)
    times = [sum(cost.seconds(gpu) for cost in found) * 1e6 for gpu in GPUS.values()]
    return [f"{size / 1e6:,.0f}", f"{operations / 1e9:,.0f}", *(f"{time:,.0f}" for time in times)]


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def rewritten(page: str, lines: str) -> str:
    """Return the page with its table replaced."""
    before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
    return before + MARKS[0] + lines + MARKS[1] + after


def main(command_line: Sequence[str] | None = None) -> int:
    """Print the table, or write it to a page."""
    parser = argparse.ArgumentParser(prog="python -m hybridmem_kernels.tools.roofline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--write", type=Path, help="page with two marks around the table to replace")
    arguments = parser.parse_args(command_line)
    shapes = Shapes.of(arguments.config)
    lines = table([cost for operator in OPERATORS for cost in costs(operator, shapes)])
    if arguments.write:
        arguments.write.write_text(rewritten(arguments.write.read_text(), lines))
    else:
        print(lines, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
