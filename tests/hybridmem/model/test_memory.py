"""Memories: bounds under adversarial streams, step rules, switches and recall."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from hybridmem.model.memory import NeuralMemory, write_bound
from hybridmem.model.sequence import TokenSequence
from hybridmem_kernels import memory_scan
from tests.hybridmem.models import tiny_config
from tests.unchecked import ROOT

DIM = 8


@pytest.fixture
def adversarial(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("adversarial")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("depth", "tokens"), [(1, 40_000), (2, 40_000), (3, 20_000), (4, 20_000)])
def test_adversarial_streams_stay_finite(adversarial, depth, tokens, dtype):
    """Every write is as large as the default rule allows, with momenta up to 0.99 (scripts test a million tokens)."""
    found = adversarial.run(depth, dtype, tokens=tokens)
    assert found["finite"]
    # A linear memory even stays close to the size of its targets.
    assert depth > 1 or found["state"] < 100


def test_raw_steps_do_grow(adversarial):
    """Without the rule, these streams overflow at theta = 0.9 and eta = 0.73."""
    keys, values = adversarial.keys(0, 2_000)[:, None], adversarial.values(0, 2_000)[:, None]
    ones = torch.ones(4, 1, 2_000)
    _, state = memory_scan(keys, keys, values, 0 * ones, 0.73 * ones, 0.9 * ones)
    assert not torch.isfinite(state.weight).all() or state.weight.abs().max() > 1e6


def test_write_bounds():
    eta = torch.tensor([0.0, 0.5, 0.9])
    torch.testing.assert_close(write_bound("certified", eta), torch.tensor([1.0, 0.5 / 1.5, 2 * 0.01 / 1.9]))
    torch.testing.assert_close(write_bound("damped", eta), 1 - eta)
    torch.testing.assert_close(write_bound("raw", eta), torch.ones(3))


@pytest.mark.parametrize("step", ["certified", "damped", "raw"])
def test_gates_keep_to_the_rule(step):
    memory = NeuralMemory(tiny_config(memory_step=step))
    torch.nn.init.normal_(memory.gate_proj.weight, std=10.0)
    if memory.eta_logit is not None:
        torch.nn.init.normal_(memory.eta_logit, std=3.0)
    alpha, eta, theta = memory._gates(torch.randn(3, 50, 16))
    assert ((alpha >= 0) & (alpha <= 1) & (eta >= 0) & (eta <= 1)).all()
    assert (theta <= write_bound(step, eta) + 1e-6).all()
    constant = eta.std(dim=(0, 2)).max() < 1e-6
    assert constant == (step == "certified")


def test_switches():
    memory = NeuralMemory(tiny_config(memory_momentum=False, memory_forgetting=False, memory_conv_size=1))
    alpha, eta, _ = memory._gates(torch.randn(1, 5, 16))
    assert (alpha == 0).all()
    assert (eta == 0).all()
    assert memory.convolution is None


def test_a_written_pair_is_read_back_and_a_forgotten_one_is_not():
    keys = F.normalize(torch.randn(1, 1, 6, DIM), dim=-1)
    values = torch.randn(1, 1, 6, DIM)
    ones = torch.ones(1, 1, 6)
    out, _ = memory_scan(keys, keys, values, 0 * ones, 0 * ones, ones)
    torch.testing.assert_close(out, values)  # a full step without momentum stores exactly
    wipe = torch.zeros(1, 1, 6)
    wipe[..., 4] = 1
    again = torch.cat((keys[:, :, :5], keys[:, :, :1]), dim=2)
    out, _ = memory_scan(again, keys, values, wipe, 0 * ones, torch.where(ones.cumsum(-1) > 4, 0.0, ones))
    torch.testing.assert_close(out[:, :, 5], torch.zeros(1, 1, DIM))


def test_reading_writes_nothing():
    memory = NeuralMemory(tiny_config()).double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    _, state = memory(x, None, TokenSequence())
    queries, _ = memory.queries(x, None, TokenSequence())
    before = state.scan.weight.clone()
    memory.read(x, queries, state.scan)
    assert torch.equal(state.scan.weight, before)
