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


def random_memory(**changes):
    torch.manual_seed(0)
    memory = NeuralMemory(tiny_config(**changes)).double()
    for parameter in memory.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return memory


@torch.no_grad()
@pytest.mark.parametrize("step", ["certified", "damped"])
def test_skipped_tokens_leave_the_memory_as_if_the_text_lacked_them(step):
    memory, x = random_memory(memory_step=step, memory_conv_size=1), torch.randn(2, 21, 16, dtype=torch.float64)
    writes = torch.rand(21) < 0.5
    writes[0] = writes[-1] = False
    out, state = memory(x, None, TokenSequence(writes=writes.expand(2, -1)))
    short, wanted = memory(x[:, writes], None, TokenSequence())
    torch.testing.assert_close(state, wanted)
    torch.testing.assert_close(out[:, writes], short)
    queries, _ = memory.queries(x[:, -1:], None, TokenSequence())
    torch.testing.assert_close(out[:, -1:], memory.read(x[:, -1:], queries, wanted.scan))
    assert out[:, 0].abs().max() == 0  # nothing is stored yet


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(5, 8, 8), (1,) * 21], ids=["chunks", "one by one"])
def test_skipped_tokens_in_any_split(sizes):
    memory, x = random_memory(), torch.randn(2, 21, 16, dtype=torch.float64)
    writes, state, parts = torch.rand(2, 21) < 0.5, None, []
    wanted, last = memory(x, None, TokenSequence(writes=writes))
    for part, own in zip(x.split(sizes, 1), writes.split(sizes, 1), strict=True):
        out, state = memory(part, state, TokenSequence(writes=own, decodes=len(sizes) > 3))
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), wanted)
    torch.testing.assert_close(state, last)


@torch.no_grad()
def test_a_document_whose_first_token_is_skipped_finds_an_empty_memory():
    memory, x = random_memory(), torch.randn(1, 14, 16, dtype=torch.float64)
    documents = torch.tensor([[0] * 6 + [1] * 8])
    writes = torch.rand(1, 14) < 0.5
    writes[0, 5:8] = torch.tensor([True, False, False])
    out, _ = memory(x, None, TokenSequence(document_ids=documents, writes=writes))
    alone, _ = memory(x[:, 6:], None, TokenSequence(writes=writes[:, 6:]))
    torch.testing.assert_close(out[:, 6:], alone)


def test_a_deep_memory_stores_every_token():
    memory = random_memory(memory_depth=2)
    with pytest.raises(ValueError, match="memory_depth=2 stores every token"):
        memory(torch.randn(1, 3, 16).double(), None, TokenSequence(writes=torch.ones(1, 3, dtype=torch.bool)))
