from types import SimpleNamespace

import pytest

from hybridmem.training import PolicyModule, PretrainModule, RetrofitModule
from hybridmem.training import precision as module


def trainer(**settings):
    return SimpleNamespace(**{"accelerator": "cpu", "precision": None, "plugins": None, **settings})


@pytest.mark.parametrize(
    ("hardware", "settings", "kind", "expected"),
    [
        ("AMX", {}, PretrainModule, "bf16-mixed"),
        ("AVX-512", {}, PretrainModule, None),
        (None, {}, PretrainModule, None),
        ("AMX", {"precision": "32-true"}, PretrainModule, None),
        ("AMX", {"accelerator": "auto"}, PretrainModule, None),
        ("AMX", {"plugins": [object()]}, PretrainModule, None),
        ("AMX", {}, PolicyModule, "bf16-mixed"),
        (None, {}, PolicyModule, None),
        ("AMX", {}, RetrofitModule, None),
    ],
)
def test_training_takes_bfloat16_where_the_cpu_gains_and_no_setting_is_given(
    hardware, settings, kind, expected, monkeypatch
):
    monkeypatch.setattr(module, "bfloat16_hardware", lambda: hardware)
    assert module.choose_precision(trainer(**settings), kind) == expected


def test_one_line_reports_the_choice_and_how_to_change_it(monkeypatch):
    monkeypatch.setattr(module, "bfloat16_hardware", lambda: "AMX")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    assert "--trainer.precision 32-true" in module.precision_advice(trainer(), "bf16-mixed")
    assert "--trainer.precision bf16-mixed trains" in module.precision_advice(trainer(precision="32-true"), None)
    assert "--trainer.precision bf16-mixed" in module.precision_advice(trainer(accelerator="auto"), None)
    assert module.precision_advice(trainer(precision="bf16-true"), None) is None
    assert module.precision_advice(trainer(accelerator="gpu"), None) is None


def test_other_cpus_need_no_advice(monkeypatch):
    monkeypatch.setattr(module, "bfloat16_hardware", lambda: "AVX-512")
    assert module.precision_advice(trainer(), None) is None
