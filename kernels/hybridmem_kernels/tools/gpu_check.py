"""Correctness and speed of the Triton operators on a GPU.

    python -m hybridmem_kernels.tools.gpu_check [--output check_gpu.json]

Outputs and gradients of each case are compared in float32, bfloat16 and float16 with the token-by-token definition in
float64 on identical inputs. This uses --jobs processes, because building kernels dominates the run time. Then both
backends are timed side by side in a single process (timing.py). All results go into one file, to be attached to a
report.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_divergence import attention_divergence
from ..memory_mlp_scan import MemoryMLPState, memory_mlp_scan
from ..memory_scan import MemoryState, memory_scan
from .timing import NUM_CALLS, benchmark, build

# Relative to a tensor's norm: rounding to the dtype, and different orders of summation. Products of 16-bit tokens are
# in TF32, whose rounding of 5e-4 is amplified tenfold over 256 tokens by a deep memory without a gradient bound.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Test case: one call of an operator.

    Args:
        operator, name: labels for the report.
        tensors: inputs with gradients, in float64.
        rounded: names of the inputs that are rounded to the tested dtype; the others are float32.
        run: function from (tensors, backend) to the meaningful outputs.
    """

    operator: str
    name: str
    tensors: Tensors
    rounded: tuple[str, ...]
    run: Callable[[Tensors, str], list[Tensor]]


@dataclass(frozen=True)
class Comparison:
    """Largest errors of a case, relative to the norm of each tensor."""

    operator: str
    case: str
    dtype: str
    output_error: float
    gradient_error: float
    tolerance: float
    passed: bool


def compare(case: Case, dtype: torch.dtype, device: str) -> Comparison:
    """Compare the Triton backend with the definition."""
    low = {
        name: x.to(device, dtype if name in case.rounded else torch.float32).requires_grad_()
        for name, x in case.tensors.items()
    }
    exact = {name: x.detach().double().requires_grad_() for name, x in low.items()}
    expected, got = case.run(exact, "reference"), case.run(low, "triton")
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device) for x in expected]
    gradients = [
        torch.autograd.grad(
            [x for x in outputs if x.requires_grad],
            list(leaves.values()),
            [c.to(x.dtype) for x, c in zip(outputs, cotangents, strict=True) if x.requires_grad],
            materialize_grads=True,
        )
        for outputs, leaves in ((expected, exact), (got, low))
    ]
    output_error = max(_error(a, b) for a, b in zip(got, expected, strict=True))
    gradient_error = max(_error(a, b) for a, b in zip(gradients[1], gradients[0], strict=True))
    tolerance = TOLERANCES[dtype]
    passed = output_error <= tolerance and gradient_error <= tolerance
    name = str(dtype).removeprefix("torch.")
    return Comparison(case.operator, case.name, name, output_error, gradient_error, tolerance, passed)


def _error(got: Tensor, expected: Tensor) -> float:
    """Return the error relative to the norm; non-finite errors count as infinite."""
    difference = (got.double() - expected).norm() / expected.norm().clamp(min=1e-6)
    return float(difference.detach().nan_to_num(nan=float("inf")))


def cases(time: int, shrink: int = 1) -> list[Case]:
    """List cases of every operator with texts of about `time` tokens, some with documents, padding and odd sizes.

    `shrink` divides the deep memory's widths, whose products are slow in Triton's interpreter.
    """
    deep = [tuple(width // shrink for width in widths) for widths in ((64, 64, 64), (48, 96, 96, 48), (64, 128, 64))]
    return [
        memory_scan_case("plain", time, 64, 64, chunk_size=64),
        memory_scan_case("documents, padding, a state", time + 5, 48, 80, chunk_size=32, everything=True),
        memory_scan_case("wide heads", time, 128, 32, chunk_size=128),
        memory_scan_case("one token", 1, 64, 64, chunk_size=64, everything=True),
        memory_mlp_scan_case("depth 2", time, deep[0], chunk_size=64),
        memory_mlp_scan_case("depth 3, bounded", time + 5, deep[1], chunk_size=32, max_grad_norm=0.7),
        memory_mlp_scan_case("documents, padding, a state", time, deep[2], chunk_size=16, everything=True),
        attention_divergence_case("causal", time, 64, 64),
        attention_divergence_case("window, masks, other heads", time, 64, 48, window=48, everything=True),
        attention_divergence_case("kl", time, 96, 96, divergence="kl"),
        attention_divergence_case("reverse kl, itself included", time, 32, 32, divergence="reverse_kl", itself=True),
    ]


def memory_scan_case(
    name: str, time: int, key_dim: int, value_dim: int, *, chunk_size: int, everything: bool = False
) -> Case:
    """Create a case of `memory_scan`; `everything` adds documents, padding and a given state."""
    tensors = _scan_tensors(2, 3, time, key_dim, value_dim)
    rows = _rows(2, time) if everything else {}
    if everything:
        tensors |= {part: torch.randn(2, 3, key_dim, value_dim, dtype=torch.float64) for part in MemoryState._fields}

    def run(given: Tensors, backend: str) -> list[Tensor]:
        given = dict(given)
        state = MemoryState(*(given.pop(part) for part in MemoryState._fields)) if everything else None
        here = {row: x.to(given["q"].device) for row, x in rows.items()}
        out, state = memory_scan(**given, state=state, chunk_size=chunk_size, backend=backend, in_place=False, **here)
        return [_valid(out, here), *state]

    return Case("memory_scan", name, tensors, ("q", "k", "v"), run)


def memory_mlp_scan_case(
    name: str,
    time: int,
    widths: Sequence[int],
    *,
    chunk_size: int,
    max_grad_norm: float | None = None,
    everything: bool = False,
) -> Case:
    """Create a case of `memory_mlp_scan`; `everything` adds documents, padding and a state from inside a chunk."""
    tensors, depth = _scan_tensors(2, 2, time, widths[0], widths[0]), len(widths) - 1
    rows = _rows(2, time) if everything else {}
    groups = ("learned", "weights", "momenta", "anchors") if everything else ("learned",)
    for group in groups:
        for n, (rows_in, columns) in enumerate(pairwise(widths)):
            lead = (2,) if group == "learned" else (2, 2)
            tensors[f"{group}{n}"] = torch.randn(*lead, rows_in, columns, dtype=torch.float64) * 0.5 / rows_in**0.5

    def run(given: Tensors, backend: str) -> list[Tensor]:
        arguments: dict[str, Any] = {x: given[x] for x in ("q", "k", "v", "alpha", "eta", "theta")}
        learned, *state = (tuple(given[f"{group}{n}"] for n in range(depth)) for group in groups)
        device = given["q"].device
        here = {row: x.to(device) for row, x in rows.items()}
        start = MemoryMLPState._make((*state, torch.tensor([3, 0], device=device))) if everything else None
        arguments |= dict(weights=learned, state=start, chunk_size=chunk_size, max_grad_norm=max_grad_norm) | here
        out, end = memory_mlp_scan(**arguments, backend=backend)
        is_open = (end.filled > 0)[:, None, None, None]  # anchors are meaningful only inside a chunk
        return [_valid(out, here), *end.weights, *end.momenta, *(anchor * is_open for anchor in end.anchors)]

    return Case("memory_mlp_scan", name, tensors, ("q", "k", "v"), run)


def attention_divergence_case(
    name: str,
    time: int,
    dim: int,
    dim_ref: int,
    *,
    window: int | None = None,
    divergence: str = "jsd",
    itself: bool = False,
    everything: bool = False,
) -> Case:
    """Create a case of `attention_divergence`; `everything` adds grouped heads, persistent keys and both masks."""
    kv_heads, persistent = (2, 3) if everything else (4, 0)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"q": normal(2, 4, time, dim), "k": normal(2, kv_heads, time + persistent, dim)}
    reference = normal(2, 2, time, dim_ref), normal(2, 2, time, dim_ref)
    masks = {}
    if everything:
        masks = {mask: torch.rand(2, time, generator=generator) < 0.8 for mask in ("query_mask", "key_mask")}

    def run(given: Tensors, backend: str) -> list[Tensor]:
        like = given["q"]
        q_ref, k_ref = (x.to(like.device, like.dtype) for x in reference)
        options: dict[str, Any] = {name: x.to(like.device) for name, x in masks.items()}
        options |= dict(window=window, window_ref=window, divergence=divergence, backend=backend)
        options |= dict(exclude_self=not itself, num_persistent=persistent)
        return list(attention_divergence(like, given["k"], q_ref, k_ref, **options))

    return Case("attention_divergence", name, tensors, ("q", "k"), run)


def _scan_tensors(batch: int, heads: int, time: int, key_dim: int, value_dim: int) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, time, dim, generator=generator, dtype=torch.float64)
        for dim in (key_dim, key_dim, value_dim)
    )
    gates = torch.rand(3, batch, heads, time, generator=generator, dtype=torch.float64)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return dict(q=q, k=k, v=v, alpha=gates[0] * 0.1, eta=gates[1] * 0.8, theta=gates[2] * 0.3)


def _rows(batch: int, time: int) -> Tensors:
    """Create documents that start inside and at the edge of chunks, and left padding in one row."""
    starts = torch.zeros(batch, time, dtype=torch.long)
    starts[:, 16::23] = 1
    mask = torch.ones(batch, time, dtype=torch.bool)
    mask[0, : time // 5] = False
    return dict(document_ids=starts.cumsum(1), mask=mask)


def _valid(out: Tensor, rows: Tensors) -> Tensor:
    return out * rows["mask"][:, None, :, None] if rows else out


def compare_nth(number: int, time: int, dtype: torch.dtype, device: str) -> Comparison:
    """Compare one of the cases in a worker process, to which closures cannot be sent."""
    return compare(cases(time)[number], dtype, device)


def compare_all(time: int, bench_time: int, jobs: int) -> list[Comparison]:
    """Compare and print every case in every dtype, while building the kernels that are timed later."""
    print(f"{'operator':22}{'case':34}{'dtype':10}{'outputs':>10}{'gradients':>11}")
    comparisons = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        builds = [pool.submit(build, number, bench_time, "cuda") for number in range(NUM_CALLS if bench_time else 0)]
        runs = [
            pool.submit(compare_nth, number, time, dtype, "cuda")
            for number in range(len(cases(1)))
            for dtype in TOLERANCES
        ]
        for run in runs:
            found = run.result()
            comparisons.append(found)
            errors = f"{found.output_error:10.1e}{found.gradient_error:11.1e}"
            wrong = "" if found.passed else "   WRONG"
            print(f"{found.operator:22}{found.case:34}{found.dtype:10}{errors}{wrong}", flush=True)
        for done in builds:
            done.result()
    return comparisons


def machine() -> dict[str, Any]:
    """Describe the machine on which the figures were measured."""
    import triton

    gpu = torch.cuda.get_device_properties(0)
    return dict(
        gpu=gpu.name,
        memory_gb=round(gpu.total_memory / 2**30, 1),
        capability=".".join(map(str, torch.cuda.get_device_capability())),
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
    )


def main(command_line: Sequence[str] | None = None) -> int:
    """Check and time the operators; return 1 without a GPU or on failure."""
    parser = argparse.ArgumentParser(
        prog="scripts/check_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("check_gpu.json"))
    parser.add_argument("--time", type=int, default=256, help="tokens of the checked texts")
    parser.add_argument("--bench-time", type=int, default=4096, help="tokens of the timed texts; 0: skip timing")
    jobs = min(8, os.cpu_count() or 1)
    parser.add_argument(
        "--jobs", type=int, default=jobs, help="processes for building and comparing, each using 1 GB of GPU memory"
    )
    arguments = parser.parse_args(command_line)
    if not torch.cuda.is_available():
        print("no GPU found (torch.cuda.is_available() is False), so nothing was checked", file=sys.stderr)
        print("run this on a machine with a GPU and a torch build that supports it", file=sys.stderr)
        return 1
    comparisons = compare_all(arguments.time, arguments.bench_time, arguments.jobs)
    speeds = benchmark(arguments.bench_time, "cuda") if arguments.bench_time else []
    result = dict(machine=machine(), comparisons=[asdict(x) for x in comparisons], speeds=[asdict(x) for x in speeds])
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [x for x in comparisons if not x.passed]
    print(f"{len(comparisons) - len(wrong)} of {len(comparisons)} comparisons passed; see {arguments.output}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
