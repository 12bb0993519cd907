"""Distributions are normalised, equal their definitions and have gradients with respect to all their inputs."""

import pytest
import torch

from hybridmem.rl import AttentionRecorder
from hybridmem.rl.attention.distributions import allocation, distribution, memory, unified
from hybridmem.rl.attention.targets import TARGETS
from tests.hybridmem.models import tiny_model, tokens

HAS = {
    "mac": TARGETS,
    "mag": TARGETS,
    "mal": TARGETS,
    "lmm": ("allocation", "memory", "unified"),
    "swa": ("attention", "unified"),
    "full": ("attention", "unified"),
}


def record(variant, time=20, **changes):
    model = tiny_model(variant=variant, **changes)
    with AttentionRecorder(model) as recorder:
        model(tokens(time=time), use_cache=False)
    return model, recorder.records[1]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", HAS)
def test_rows_are_distributions_over_earlier_tokens(variant, target):
    _, found = record(variant)
    if target not in HAS[variant]:
        with pytest.raises(ValueError, match="choose"):
            distribution(found, target, 20)
        return
    rows = distribution(found, target, 20)
    total = torch.ones(20, dtype=rows.dtype)
    if target != "allocation":
        total[0] = 0  # the first token has no earlier tokens
    if (variant, target) == ("mac", "attention"):
        total[:: found.segments[0].q.shape[2]] = 0  # neither has a segment's first token
    torch.testing.assert_close(rows.sum(-1), total.expand(2, -1))
    assert (rows >= 0).all()
    if target != "allocation":
        assert torch.equal(rows, rows.tril(-1))


def test_memory_implied_attention_is_the_read_out_taken_apart():
    """The writes' contributions −D theta (q·k) delta sum to the read; their norms are the distribution."""
    _, found = record("lmm", time=17)
    q, k, v, alpha, eta, theta = (x.double() for x in found.memory)
    batch, heads, time, dim = q.shape
    weight, momentum = torch.zeros(2, batch, heads, dim, dim).double()
    parts = torch.zeros(batch, heads, time, time, dim).double()  # contribution of write j to each token's read
    left_w, left_s = torch.zeros(2, batch, heads, time).double()
    errors = []
    for t in range(time):
        delta = torch.einsum("bhd,bhde->bhe", k[:, :, t], weight) - v[:, :, t]
        errors.append(delta)
        left_s = left_s * eta[:, :, t, None]
        left_s[..., t] = 1
        left_w = left_w * (1 - alpha[:, :, t, None]) + left_s
        write = theta[:, :, t, None, None] * k[:, :, t, :, None] * delta[:, :, None]
        momentum = eta[:, :, t, None, None] * momentum - write
        weight = (1 - alpha[:, :, t, None, None]) * weight + momentum
        for j in range(t + 1):
            overlap = (q[:, :, t] * k[:, :, j]).sum(-1)
            parts[:, :, t, j] = -(left_w[..., j] * theta[:, :, j] * overlap)[..., None] * errors[j]
        torch.testing.assert_close(parts[:, :, t].sum(2), torch.einsum("bhd,bhde->bhe", q[:, :, t], weight))
    size = parts.norm(dim=-1).tril(-1)
    expected = (size / size.sum(-1, keepdim=True).clamp(min=1e-30)).mean(1)
    torch.testing.assert_close(memory(found, time), expected, rtol=0, atol=1e-10)


def test_memory_reaches_the_gates_queries_and_keys():
    model, found = record("lmm", memory_step="damped")
    memory(found, 12).square().sum().backward()
    layer = model.model.layers[1].mixer.memory
    alpha, theta, eta = layer.gate_proj.weight.grad.chunk(3)  # certified momentum has a separate parameter
    queries, keys, _ = layer.qkv_proj.weight.grad.chunk(3)
    for grad in (alpha, theta, eta, queries, keys):
        assert grad.abs().max() > 0


def test_the_momentum_of_certified_steps_is_reached_as_well():
    model, found = record("mag")
    memory(found, 12).square().sum().backward()
    assert model.model.layers[1].mixer.memory.eta_logit.grad.abs().min() > 0


def test_mags_allocation_is_its_gate():
    _, found = record("mag")
    shares = allocation(found, 5)
    torch.testing.assert_close(shares[..., 2], found.gate[:, -5:].mean(-1))
    assert (shares[..., 0] == 0).all()


def test_unified_adds_both_ways_to_reach_a_token():
    _, found = record("mag")
    gate = found.gate[:, -6:].mean(-1, keepdim=True)
    both = gate * distribution(found, "attention", 6) + (1 - gate) * distribution(found, "memory", 6)
    torch.testing.assert_close(unified(found, 6), both)


def test_a_deep_memory_implies_no_attention():
    _, found = record("lmm", memory_depth=2)
    with pytest.raises(ValueError, match="memory_depth=2"):
        memory(found, 4)


@pytest.mark.parametrize("target", ["attention", "memory", "allocation"])
def test_no_mass_on_padding(target):
    model, ids = tiny_model(variant="mag"), tokens(time=12)
    padded = torch.nn.functional.pad(ids, (5, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (5, 0))
    with AttentionRecorder(model) as recorder:
        model(ids, use_cache=False)
        alone = distribution(recorder.records[1], target, 6)
        model(padded, attention_mask=mask, use_cache=False)
        beside = distribution(recorder.records[1], target, 6)
    if target != "allocation":
        assert (beside[..., :5] == 0).all()
        beside = beside[..., 5:]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-9)
