"""The memory's bounds: adversarial streams, step rules, switches, and what it is for."""

import pytest
import torch
import torch.nn.functional as F

from hybridmem.memory import NeuralMemory, write_bound
from hybridmem.sequence import TokenSequence
from hybridmem_kernels import memory_mlp_scan, memory_scan

from .models import tiny_config

DIM = 8


def adversarial_keys(tokens: int) -> torch.Tensor:
    """(streams, tokens, DIM): one key again and again, two nearly opposite ones in turn, blocks of one key each whose
    length grows, random keys."""
    g = torch.Generator().manual_seed(0)
    basis = F.normalize(torch.randn(4, DIM, generator=g), dim=-1)
    clock = torch.arange(tokens)
    repeated = basis[:1].expand(tokens, DIM)
    flipped = torch.where((clock % 2 == 0)[:, None], basis[0], F.normalize(-basis[0] + 0.1 * basis[1], dim=-1))
    blocks = basis[(clock.float().sqrt().long()) % 4]
    random = F.normalize(torch.randn(tokens, DIM, generator=g), dim=-1)
    return torch.stack((repeated, flipped, blocks, random))


def adversarial_values(tokens: int) -> torch.Tensor:
    """Values that change sign in every pattern that a momentum could swing along with."""
    clock = torch.arange(tokens)
    signs = [torch.ones(tokens), (-1.0) ** clock, (-1.0) ** (clock // 7), (-1.0) ** (clock.float().sqrt().long())]
    return torch.stack(signs)[:, :, None].expand(4, tokens, DIM)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_adversarial_streams_stay_finite_for_100_000_tokens(depth):
    """Nothing is forgotten and every write is as large as the default rule allows, at momenta up to 0.99."""
    tokens, piece = 100_000, 2_000
    keys = adversarial_keys(tokens).repeat_interleave(4, dim=0)[:, None].expand(-1, 4, -1, -1)
    values = adversarial_values(tokens).repeat(4, 1, 1)[:, None].expand(-1, 4, -1, -1)
    eta = torch.tensor([0.0, 0.3, 0.8, 0.99])[None, :, None].expand(16, 4, piece)
    theta = write_bound("certified", eta) / depth
    alpha = torch.zeros(16, 4, piece)
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(4, DIM, DIM, generator=g) * DIM**-0.5 for _ in range(depth)]
    state, largest = None, 0.0
    with torch.no_grad():
        for start in range(0, tokens, piece):
            k, v = keys[:, :, start : start + piece], values[:, :, start : start + piece]
            if depth == 1:
                out, state = memory_scan(k, k, v, alpha, eta, theta, state)
                held = [state.weight, state.momentum]
            else:
                out, state = memory_mlp_scan(k, k, v, alpha, eta, theta, weights, state, max_grad_norm=1.0)
                held = [*state.weights, *state.momenta]
            assert torch.isfinite(out).all(), start
            assert all(torch.isfinite(x).all() for x in held), start
            largest = max(largest, max(x.abs().max().item() for x in held))
    # A linear memory even stays near the size of what it was given to hold.
    assert depth > 1 or largest < 100


def test_raw_steps_do_grow():
    """The rule is there for a reason: with theta = 0.9 and eta = 0.73 the same streams overflow."""
    keys, values = adversarial_keys(2_000)[:, None], adversarial_values(2_000)[:, None]
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
    if memory.momentum_logit is not None:
        torch.nn.init.normal_(memory.momentum_logit, std=3.0)
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
