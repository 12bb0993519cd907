"""Logged memory and attention metrics are correct, and the probe leaves no trace."""

import pytest
import torch

from hybridmem.model.sequence import TokenSequence
from hybridmem.training.callbacks.memory_probe import observe
from hybridmem_kernels import memory_scan
from tests.hybridmem.models import KINDS, tiny_model, tokens


@pytest.mark.parametrize("kind", KINDS)
def test_reports_the_variants_parts(kind):
    model = tiny_model(torch.float32, **KINDS[kind]).train()
    seen = observe(model, tokens(batch=1, time=30))
    has_memory = model.config.has_memory
    assert ("memory/surprise" in seen) == ("memory/half_life" in seen) == has_memory
    assert ("allocation/attention" in seen) == ("mag" in model.config.layer_types)
    assert ("attention/effective_span" in seen) == any(
        kind in ("mag", "mal", "swa", "full") for kind in model.config.layer_types
    )
    assert all(torch.isfinite(torch.tensor(value)) for value in seen.values())
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules() if not hasattr(module, "config"))


def test_surprise_is_the_error_before_the_write():
    memory = tiny_model(variant="lmm").model.layers[0].mixer.memory
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    trace = memory.trace(x, None, TokenSequence())
    inputs, _ = memory.scan_inputs(x, None, TokenSequence())
    for t in range(1, 12):
        before = [tensor[:, :, :t] for tensor in inputs]
        _, state = memory_scan(*before)
        error = inputs.k[:, :, t, None] @ state.weight - inputs.v[:, :, t, None]
        torch.testing.assert_close(trace.surprise[:, :, t - 1], error.norm(dim=-1)[..., 0])
