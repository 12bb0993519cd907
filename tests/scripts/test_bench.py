"""The benchmarks' statistics on given times; no test depends on real timings."""

import importlib
import json
from types import ModuleType

import pytest
import torch

from tests.unchecked import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def test_every_call_is_timed_in_every_round(bench):
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = bench("bench_measure").in_turn(calls, rounds=3)
    assert order == list("ab" * 4)  # one warm-up call each
    assert {name: len(of) for name, of in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_round_by_round(bench):
    # The second round is slow for both, as on a temporarily busy machine.
    assert bench("bench_measure").ratio({"a": [2, 20, 2], "b": [1, 10, 2]}, "a", "b") == 2


def test_executed_products_are_counted(bench):
    memory: ModuleType = bench("bench_memory")
    a, b, vector = torch.randn(3, 8, 16), torch.randn(3, 16, 32), torch.randn(3, 16, 1)
    with memory.Products() as products:
        torch.bmm(a, b)
        torch.zeros(3, 32, 8).baddbmm_(b.mT, a.mT)
        torch.bmm(a, vector)  # a matrix-vector product, which does not count
        a.add_(1)
    assert products.operands == [
        ((a.shape, a.stride()), (b.shape, b.stride())),
        ((b.mT.shape, b.mT.stride()), (a.mT.shape, a.mT.stride())),
    ]
    products.replay()()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_scan_step_takes_every_gradient(bench, depth):
    grads = bench("bench_memory").scan_step(depth, 1, 64)()
    assert len(grads) == (6 if depth == 1 else 8)
    assert all(grad.isfinite().all() for grad in grads)


def test_models_have_the_parameters_that_are_wanted(bench):
    memory = bench("bench_memory")
    wanted = memory.parameters(memory.our_model("mag"))
    assert memory.parameters(memory.our_model("swa", wanted)) == pytest.approx(wanted, rel=1e-3)


def test_the_report_shows_changed_ratios(bench):
    report = bench("bench_all")
    assert report.line("scan", 1.5, 1.2).endswith("before    1.200  +25%")
    assert report.line("scan", 1.5, None).endswith("new")


def test_the_committed_ratios_are_those_that_are_measured(bench):
    report = bench("bench_all")
    committed = json.loads(report.COMMITTED.read_text())
    assert committed["processor"]
    assert list(committed["ratios"]) == list(report.RATIOS)


def test_a_decoder_takes_a_token_of_every_row_with_each_call(bench):
    decode = bench("bench_decode")
    (model,) = decode.make_models(["swa"]).values()
    step = decode.decoder(model, batch=2, prompt=5)
    first, second = (step() for _ in range(2))
    assert second.logits.shape == (2, 1, decode.VOCABULARY)
    assert second.past_key_values.get_seq_length() == 7
    assert not torch.equal(first.logits, second.logits)
