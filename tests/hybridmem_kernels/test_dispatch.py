"""Choice of the backend, its stated reason, and errors for unsupported inputs."""

import logging
import subprocess
import sys

import pytest
import torch

from hybridmem_kernels import attention_divergence, dispatch, memory_mlp_scan, memory_scan, use_backend
from hybridmem_kernels.dispatch import VARIABLE, choose_backend


class OnGPU(torch.Tensor):
    """Tensor that claims to be on a GPU."""

    device = torch.device("cuda")


CPU, GPU = torch.zeros(1), torch.zeros(1).as_subclass(OnGPU)


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_said", set())


def test_the_device_decides():
    assert choose_backend("scan", None, CPU) == "torch"
    assert choose_backend("scan", None, GPU) == "triton"


def test_float64_on_a_gpu_uses_torch_with_a_reason(caplog):
    with caplog.at_level(logging.INFO, "hybridmem_kernels"):
        assert choose_backend("scan", None, torch.zeros(1, dtype=torch.float64).as_subclass(OnGPU)) == "torch"
    assert "float64" in caplog.text


def test_a_gpu_without_triton_uses_torch_with_a_reason(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with caplog.at_level(logging.INFO, "hybridmem_kernels"):
        assert choose_backend("scan", None, GPU) == "torch"
    assert "pip install 'hybridmem[triton]'" in caplog.text


def test_the_argument_beats_the_context_beats_the_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    assert choose_backend("scan", None, GPU) == "reference"
    with use_backend("triton"):
        assert choose_backend("scan", None, GPU) == "triton"
        assert choose_backend("scan", "torch", GPU) == "torch"
        with use_backend("torch"):
            assert choose_backend("scan", None, GPU) == "torch"
        assert choose_backend("scan", None, GPU) == "triton"
    assert choose_backend("scan", None, GPU) == "reference"


def test_the_context_is_left_after_an_error():
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert choose_backend("scan", None, CPU) == "torch"


def test_a_choice_is_logged_once_with_its_reason(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "hybridmem_kernels"):
        for _ in range(3):
            choose_backend("scan", None, CPU)
        monkeypatch.setenv(VARIABLE, "reference")
        for _ in range(3):
            choose_backend("scan", None, CPU)
            choose_backend("other scan", None, CPU)
    assert caplog.messages == [
        "scan runs with the backend 'torch': the tensors are on cpu",
        "scan runs with the backend 'reference': HYBRIDMEM_BACKEND=reference",
        "other scan runs with the backend 'reference': HYBRIDMEM_BACKEND=reference",
    ]


def test_unknown_backends_are_refused_where_they_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='cuda' does not exist; choose one of torch, triton, reference"):
        choose_backend("scan", "cuda", CPU)
    with pytest.raises(ValueError, match=r"use_backend\('cuda'\) does not exist"), use_backend("cuda"):
        pass
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(ValueError, match="HYBRIDMEM_BACKEND=cuda does not exist"):
        choose_backend("scan", None, CPU)


def test_triton_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ImportError, match=r"backend='triton' needs Triton, which is not installed.*'torch'"):
        choose_backend("scan", "triton", GPU)


def test_triton_on_a_cpu_is_an_error_but_for_the_interpreter(monkeypatch):
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"use_backend\('triton'\) needs tensors on a GPU, got cpu"):
            choose_backend("scan", None, CPU)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert choose_backend("scan", None, CPU) == "triton"


def operators() -> dict:
    """Return one call per operator, as a function of its options."""
    x, gate = torch.randn(1, 1, 4, 16), torch.full((1, 1, 4), 0.1)
    weights = [torch.randn(1, 16, 16)] * 2
    return {
        "memory_scan": lambda **how: memory_scan(x, x, x, gate, gate, gate, **how),
        "memory_mlp_scan": lambda **how: memory_mlp_scan(x, x, x, gate, gate, gate, weights, **how),
        "attention_divergence": lambda **how: attention_divergence(x, x, x, x, **how),
    }


@pytest.mark.parametrize("name", operators())
def test_operators_ask_and_do_not_fall_back(name, monkeypatch, caplog):
    run = operators()[name]
    with caplog.at_level(logging.INFO, "hybridmem_kernels"):
        run()
        with use_backend("reference"):
            run()
    assert [message.split(":")[0] for message in caplog.messages] == [
        f"{name} runs with the backend 'torch'",
        f"{name} runs with the backend 'reference'",
    ]
    with use_backend("triton"), pytest.raises(ValueError, match="needs tensors on a GPU"):
        run()


def test_a_machine_without_triton_can_import_and_run():
    """Triton is imported on demand only, which supports macOS and Windows."""
    code = """
import sys
sys.modules["triton"] = None
import torch
import hybridmem_kernels.dispatch
hybridmem_kernels.dispatch.HAS_TRITON = False
from hybridmem_kernels import memory_scan
x, gate = torch.randn(1, 1, 4, 16), torch.full((1, 1, 4), 0.1)
memory_scan(x, x, x, gate, gate, gate)
try:
    memory_scan(x, x, x, gate, gate, gate, backend="triton")
except ImportError as error:
    print(error)
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.startswith("backend='triton' needs Triton, which is not installed")
