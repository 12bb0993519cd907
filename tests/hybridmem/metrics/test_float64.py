import pytest
import torch

from hybridmem.metrics import BitsPerByte, FormatShare, LossByPosition, PassAtK, RetentionHalfLife

METRICS = {
    "BitsPerByte": BitsPerByte,
    "LossByPosition": lambda: LossByPosition([0, 4]),
    "RetentionHalfLife": lambda: RetentionHalfLife(2),
    "FormatShare": lambda: FormatShare({"number": r"\d"}),
    "PassAtK": lambda: PassAtK(1),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu").float()])
def test_states_keep_their_precision_in_a_module_of_16_bits(name, convert):
    metric = METRICS[name]()
    convert(torch.nn.ModuleDict({"metric": metric, "layer": torch.nn.Linear(2, 2)}))
    assert all(getattr(metric, state).dtype == torch.float64 for state in metric._defaults)
    metric.reset()
    assert all(getattr(metric, state).dtype == torch.float64 for state in metric._defaults)


def test_sums_do_not_end_at_a_few_hundred():
    metric = BitsPerByte()
    torch.nn.ModuleList([metric]).to(torch.bfloat16)
    for _ in range(1000):
        metric.update(torch.full((1,), 2.0), torch.ones(1, dtype=torch.long))
    assert metric.bytes == 1000
    assert metric.compute() == pytest.approx(2 / 0.6931471805599453)


def test_states_change_their_device():
    metric = BitsPerByte()
    torch.nn.ModuleList([metric]).to("meta")
    assert metric.nats.is_meta
