"""The cost model, compared with products counted in the interpreter, and launches and bytes counted by hand."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from hybridmem_kernels import attention_divergence, memory_mlp_scan, memory_scan

from ..inputs import scan_inputs

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "kernels.md"
# Only the process below imports it, because recording needs kernels outside the interpreter.
SHAPES = "Shapes(batch=1, heads=2, time=128, dim=32, chunk=32, widths=(32, 64, 32), window=64)"


def python(code: str, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=True).stdout


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """Count the operations of all matrix products of every kernel that runs."""
    counts, running = Counter(), []
    launch, product = GridExecutor.__call__, InterpreterBuilder.create_dot

    def counting_launch(executor, *arguments, **named):
        running.append(executor.fn.__name__)
        return launch(executor, *arguments, **named)

    def counting_product(builder, a, b, *others):
        rows, inner, columns = a.data.shape[-2], a.data.shape[-1], b.data.shape[-1]
        counts[running[-1]] += 2 * a.data[..., 0, 0].size * rows * inner * columns
        return product(builder, a, b, *others)

    monkeypatch.setattr(GridExecutor, "__call__", counting_launch)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting_product)
    return counts


def call(operator: str) -> None:
    inputs = scan_inputs(time=128, batch=1, heads=2, key_dim=32, value_dim=32, dtype=torch.float32)
    tensors = inputs.tensors
    if operator == "memory_scan":
        out = memory_scan(**tensors, chunk_size=32, backend="triton")[0]
    elif operator == "memory_mlp_scan":
        weights = [torch.randn(2, *size).requires_grad_() for size in ((32, 64), (64, 32))]
        out = memory_mlp_scan(**tensors, weights=weights, chunk_size=32, max_grad_norm=1.0, backend="triton")[0]
    else:
        q, k = tensors["q"], tensors["k"]
        out = attention_divergence(q, k, q.detach(), k.detach(), window=64, window_ref=64, backend="triton").jsd
    out.sum().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("operator", ["memory_scan", "memory_mlp_scan", "attention_divergence"])
def test_operations_are_those_of_the_kernels(operator, counted):
    """Tiles do up to twice the necessary work, in partial tiles and repeated cheap products."""
    call(operator)
    code = f"from hybridmem_kernels.tools.roofline import *; print({operator}_operations({SHAPES}))"
    needed = eval(python(code))
    assert {name for name, count in counted.items() if count} == set(needed)
    twice = 2 if operator == "memory_scan" else 1  # its backward pass prepares the chunks again
    for name, operations in needed.items():
        runs = twice if name == "chunk_kernel" else 2 if name == "log_sums_kernel" else 1
        assert operations * runs <= counted[name] <= 2.1 * operations * runs, name


def test_launches_and_bytes_are_counted():
    code = f"""
from hybridmem_kernels.tools.roofline import *
for cost in costs("memory_scan", {SHAPES}):
    if cost.kernel == "output_kernel":
        print(cost.launches, cost.backward, cost.bytes)
"""
    chunks, size, dim = 2 * 4, 32, 32
    tokens = 2 * 2 * 128 * dim * 2  # q and out, bfloat16
    numbers = size * size + 7 * size + 2 * dim * dim + size * dim  # mix, columns, state, errors; float32
    assert python(code).split() == ["1", "False", str(tokens + 4 * chunks * numbers)]


def test_estimates_are_the_longer_of_bytes_and_operations():
    code = """
from hybridmem_kernels.tools.roofline import *
gpu = GPU(bandwidth=100.0, bf16=1000.0, tf32=500.0, multiprocessors=10)
def seconds(kernel, programs, size, operations):
    return Cost("", False, kernel, 1, programs, size, operations).seconds(gpu) - LAUNCH
print(seconds("compare_kernel", 10, 100, 500), seconds("compare_kernel", 10, 100, 2000))
print(seconds("scan_kernel", 10, 100, 2000), seconds("scan_kernel", 5, 100, 2000))
"""
    assert [round(float(number), 6) for number in python(code).split()] == [1.0, 2.0, 4.0, 8.0]


@pytest.mark.slow
def test_the_page_holds_the_table_of_today():
    code = """
import sys
from pathlib import Path
from hybridmem_kernels.tools import roofline
page = Path(sys.argv[1]).read_text()
lines = roofline.table([c for o in roofline.OPERATORS for c in roofline.costs(o, roofline.Shapes.of(roofline.CONFIG))])
assert roofline.rewritten(page, lines) == page
"""
    python(code, str(PAGE))
