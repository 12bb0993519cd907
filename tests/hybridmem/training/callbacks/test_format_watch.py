"""Metrics of the format watch, compared with counts made by hand."""

from typing import Any

import pytest
import torch

from hybridmem.metrics import pass_at_k
from hybridmem.training import PolicyModule
from hybridmem.training.policy.validation import Answered
from tests.hybridmem.training.policy.test_module import write_config
from tests.hybridmem.training.runs import hybridmem, logged
from tests.hybridmem.training.runs import write_config as pretraining

from .test_attention_drift import CHECKPOINTS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
WATCH = {"class_path": "hybridmem.training.FormatWatch", "init_args": {"k": [2, 4]}}
TWO = {"class_path": "hybridmem.tasks.TwoFormats", "init_args": {"digits": 1}}
# Four responses to each of four prompts; S stands for the right sum.
WRITTEN = [
    "a=1+1#2;r=S", "1+1=2, so S", "1+1=2, so 99", "nothing",
    "a=1+1#2;r=99", "a=1+1#2;r=99", "S", "S",
    "a=1+1#2;r=S", "a=1+1#2;r=S", "a=1+1#2;r=99", "a=1+1#2;r=98",
    "nothing", "nothing", "nothing", "1+1=2, so 99",
]  # fmt: skip
RIGHT = torch.tensor([["S" in text for text in WRITTEN[n : n + 4]] for n in (0, 4, 8, 12)])


def answers_as_written(module: PolicyModule, batch: list[dict[str, Any]], batch_idx: int) -> Answered:
    """Make validation produce the answers above."""
    rows = WRITTEN[8 * batch_idx : 8 * batch_idx + 8]
    sums = [module.data.task.final_answer(example["answer"]) for example in batch for _ in range(4)]
    sampled = [text.replace("S", right) for text, right in zip(rows, sums, strict=True)]
    return Answered(batch, sampled[::4], sampled).judged(module.data.task)


def test_logged_metrics_equal_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(PolicyModule, "validation_step", answers_as_written)
    config = write_config(tmp_path, trainer__callbacks=[WATCH], data__init_args__task=TWO)
    hybridmem(monkeypatch, "fit", "--config", config)
    found = {
        name: logged(tmp_path, f"val/{name}")
        for name in (
            "format/share/equation",
            "format/share/python",
            "format/share/other",
            "format/accuracy/equation",
            "format/accuracy/python",
            "format/accuracy/other",
            "format/entropy",
            "pass@2",
            "pass@4",
            "maj@2",
            "maj@4",
        )
    }
    shares = torch.tensor([3, 7, 6]) / 16
    expected = {
        "format/share/equation": 3 / 16,
        "format/share/python": 7 / 16,
        "format/share/other": 6 / 16,
        "format/accuracy/equation": 1 / 3,
        "format/accuracy/python": 3 / 7,
        "format/accuracy/other": 2 / 6,
        "format/entropy": -(shares * shares.log()).sum().item(),
        "pass@2": pass_at_k(RIGHT, 2).mean().item(),
        "pass@4": 3 / 4,
        # Pairs: S S | 99 –, 99 99 | S S, S S | 99 98, – – | – 99; – has no vote.
        "maj@2": (1 / 2 + 1 / 2 + 1 / 2 + 0) / 4,
        # Fours: S S 99 –, a tie of 99 and S, S S 99 98, 99.
        "maj@4": (1 + 1 / 2 + 1 + 0) / 4,
    }
    for name, value in expected.items():
        assert found[name] == [pytest.approx(value, abs=1e-6)], name


def test_formats_can_be_given_and_answers_are_then_texts(tmp_path, monkeypatch):
    watch = {"class_path": "hybridmem.training.FormatWatch", "init_args": {"formats": {"a": "^a", "all": ""}}}
    config = write_config(tmp_path, trainer__callbacks=[watch, CHECKPOINTS])
    hybridmem(monkeypatch, "fit", "--config", config)
    first, rest, other = (logged(tmp_path, f"val/format/share/{name}")[0] for name in ("a", "all", "other"))
    assert first + rest == pytest.approx(1)
    assert other == 0
    assert 0 <= logged(tmp_path, "val/maj@4")[0] <= 1
    options = ["--ckpt_path", tmp_path / "run" / "step=6.ckpt", "--model.init_args.num_generations", 6]
    hybridmem(monkeypatch, "validate", "--config", config, *options)
    assert logged(tmp_path, "val/pass@6")


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (dict(), "FormatWatch needs formats, and the task Letters has none; set formats"),
        (dict(formats={"a": "("}), "is not a regular expression"),
        (dict(formats={"a": "a"}, k=[2, 5]), "FormatWatch's k=[2, 5] must be between 2 and num_generations=4"),
        (dict(formats={"a": "a"}, k=[1]), "FormatWatch's k=[1] must be between 2 and"),
        (dict(k=[]), "k=[] has no group size"),
    ],
)
def test_settings_that_cannot_work_stop_before_training(tmp_path, monkeypatch, capsys, watch, message):
    callback = {"class_path": "hybridmem.training.FormatWatch", "init_args": watch}
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, trainer__callbacks=[callback]))
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_it_looks_at_policies_alone(tmp_path, monkeypatch, capsys):
    watch = {"class_path": "hybridmem.training.FormatWatch"}
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", pretraining(tmp_path, trainer__callbacks=[watch]))
    assert "FormatWatch supports PolicyModule, not PretrainModule; remove it" in capsys.readouterr().err
