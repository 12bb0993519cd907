"""The comparisons of scripts/check_gpu without a GPU, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hybridmem_kernels import memory_scan
from hybridmem_kernels.tools.gpu_check import TOLERANCES, Case, cases, compare, compare_nth
from hybridmem_kernels.tools.timing import NUM_CALLS, calls, measure

pytest.importorskip("triton")

SHORT = {f"{case.operator}, {case.name}": case for case in cases(20, shrink=3)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from masked infinities in the interpreter
@pytest.mark.parametrize(
    ("name", "dtype"), [(name, list(TOLERANCES)[n % len(TOLERANCES)]) for n, name in enumerate(SHORT)]
)
def test_operators_pass(name, dtype):
    found = compare(SHORT[name], dtype, "cpu")
    assert found.passed, found


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda q: q * 1.01, "output_error"),
        (lambda q: q + 0.01 * (q - q.detach()), "gradient_error"),
        (lambda q: q * float("nan"), "output_error"),
    ],
    ids=["outputs", "gradients", "not a number"],
)
def test_wrong_results_fail(wrong, error):
    case = SHORT["memory_scan, plain"]

    def run(given, backend):
        q = given["q"] if backend == "reference" else wrong(given["q"])
        return list(memory_scan(**dict(given, q=q), backend="reference")[0:1])

    found = compare(Case(case.operator, case.name, case.tensors, case.rounded, run), torch.float32, "cpu")
    assert not found.passed
    assert getattr(found, error) > found.tolerance


def test_a_process_of_its_own_compares_the_same_case():
    number = [case.name for case in cases(1)].index("one token")
    found = compare_nth(number, 1, torch.float32, "cpu")
    assert (found.case, found.dtype, found.passed) == ("one token", "float32", True)


def test_calls_are_timed_for_either_backend(capsys):
    assert len(calls(1, 1, 20, "cpu")) == NUM_CALLS
    speeds = [measure(call, "torch", backward=bool(call.leaves)) for call in calls(1, 1, 20, "cpu")]
    assert all(speed.milliseconds > 0 for speed in speeds)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [speed.operator for speed in speeds]


def test_it_fails_with_a_message_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "hybridmem_kernels.tools.gpu_check", "--output", tmp_path / "result.json"]
    hidden = dict(os.environ, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    done = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert done.returncode == 1
    assert done.stderr.startswith("no GPU found")
    assert not (tmp_path / "result.json").exists()


def test_the_script_runs_it():
    script = Path(__file__).parents[3] / "scripts" / "check_gpu"
    assert "-m hybridmem_kernels.tools.gpu_check" in script.read_text()
    assert os.access(script, os.X_OK)
