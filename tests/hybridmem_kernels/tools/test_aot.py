"""Ahead-of-time builds without a GPU, in a separate process, because the suite's kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
MEASURED = """
import torch, triton, triton.language as tl
from hybridmem_kernels.attention_divergence.triton_autograd import builds
from hybridmem_kernels.builds import Build
from hybridmem_kernels.tools.aot import TARGETS, _alignments, measure

@triton.jit
def product(a_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + place)
    tl.store(out_ptr + place, tl.dot(a, a, input_precision=PRECISION))

def resources(target, size, precision, num_warps):
    signature = dict(a_ptr="*fp32", out_ptr="*fp32", SIZE="constexpr", PRECISION="constexpr")
    return measure(TARGETS[target], Build("", product, signature, dict(SIZE=size, PRECISION=precision), num_warps, 1))

for build in builds(64, 64, torch.bfloat16):  # pointers and strides in tuples are aligned as others are
    places = [build.kernel.arg_names.index(name) for name in ("vectors", "strides")]
    assert {(places[0], 0), (places[0], 1), (places[1], 0), (places[1], 5)} <= set(_alignments(build)), build.name

for target in TARGETS:
    fast = resources(target, 32, "ieee" if target == "gfx942" else "tf32", 4)
    assert fast.tensor_core > 0, (target, fast)
    assert fast.spills == 0, (target, fast)
    assert 0 < fast.registers <= 256, (target, fast)
assert resources("sm80", 32, "ieee", 4).tensor_core == 0
assert resources("sm80", 128, "tf32", 1).spills > 0
assert resources("gfx942", 128, "ieee", 1).spills > 0
"""


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_registers_spills_and_tensor_cores_are_seen(tmp_path):
    (tmp_path / "measured.py").write_text(MEASURED)  # Triton needs the source file of a kernel
    done = run(str(tmp_path / "measured.py"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("sm80", "memory_scan: (chunk|scan)_kernel"),
        ("sm90", "attention_divergence: (compare|grad_keys)"),
        ("sm100", "memory_mlp_scan: read_kernel"),
        ("gfx942", "memory_scan: (output|adjoint)_kernel|memory_mlp_scan: read_kernel"),
    ],
)
def test_kernels_stay_within_the_committed_table(target, match):
    """The test builds a sample of operators and targets; `python -m hybridmem_kernels.tools.aot` builds them all."""
    options = ["--dtypes", "bf16", "--configs", "configs/pretrain/170m.yaml", "--jobs", "1"]
    done = run("-m", "hybridmem_kernels.tools.aot", "--targets", target, "--match", match, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no spill" in done.stdout
    assert f"{target:8}" in done.stdout


def test_asking_for_no_kernel_is_an_error():
    done = run("-m", "hybridmem_kernels.tools.aot", "--match", "no such kernel")
    assert done.returncode == 2
    assert "no kernel is selected" in done.stderr
