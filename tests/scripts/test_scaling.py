"""The cost model, compared with counted operations and measured states, and its up-to-date page."""

import importlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.model.cache import state_bytes
from hybridmem.training.callbacks.compute_spent import UNCOUNTED
from tests.unchecked import ROOT

TIME = 512


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("scaling")


def small(**changes) -> HybridMemConfig:
    """Return a model of two layers with blockwise attention."""
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, head_dim=32)
    memory = dict(memory_heads=2, memory_head_dim=64, memory_chunk_size=16)
    settings = dict(num_key_value_heads=2, attention_window=64, attention_conv=True, num_persistent_tokens=4)
    return HybridMemConfig(vocab_size=259, **shape, **memory, **settings | changes)


def counted(model: HybridMemForCausalLM, backward: bool) -> float:
    """Count the operations of a pass per token."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model(torch.zeros(1, TIME, dtype=torch.long)).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / TIME


def test_formulas_equal_counted_operations(scaling):
    config = small()
    model, formula = HybridMemForCausalLM(config), scaling.Model.of(config)
    forward = formula.forward()
    assert formula.parameters == model.num_parameters()
    # The formula describes the Triton kernels' memory; PyTorch's needs a few more products of the chunk's length.
    assert counted(model, backward=False) == pytest.approx(sum(forward), rel=0.03)
    without_recomputing = formula.training() - sum(forward)
    assert counted(model, backward=True) == pytest.approx(without_recomputing, rel=0.03)
    window = small(variant="swa")
    rest = scaling.Model.of(window).forward()
    # Persistent tokens are projected once, which the formula neglects.
    assert counted(HybridMemForCausalLM(window), backward=False) == pytest.approx(
        rest.linear + rest.attention, rel=1e-3
    )


@pytest.mark.parametrize("changes", [{}, {"attention_conv": False, "memory_conv_size": 1}, {"attention_window": 16}])
def test_a_state_is_as_large_as_measured(scaling, changes):
    config = small(**changes)
    model, cache = HybridMemForCausalLM(config), DynamicCache(config=config)
    with torch.no_grad():
        for _ in range(2):
            model(torch.zeros(1, 100, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert scaling.Model.of(config).state_bytes(width=4) == state_bytes(cache)


def test_bytes_sent_per_step(scaling):
    """Computed by hand: 4 ranks with one micro-batch of one row each, and 1,000 weights of 4 bytes."""
    model = scaling.Model(small(), 1000, 1000)
    step = scaling.Step(model, 4, 4 * scaling.SEQUENCE)
    assert step.ddp_bytes == pytest.approx(2 * 0.75 * 4000 / 4096)
    assert step.fsdp_bytes == pytest.approx(3 * 0.75 * 4000 / 4096)
    longer = scaling.Step(model, 4, 4 * 16 * scaling.SEQUENCE)  # two micro-batches
    assert longer.fsdp_bytes == pytest.approx(2 * 3 * 0.75 * 4000 / (16 * 4096))


def test_the_page_is_as_the_models_are(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.rewritten(page) == page
