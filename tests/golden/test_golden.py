"""Comparison of golden trajectories with the recorded ones.

On the recorded processor with the recorded libraries, all numbers must agree to the last bit: metrics, gradient norms,
sampled tokens, and weights after every step. Elsewhere rounding differs, and Adam's first steps, which use little more
than the gradients' signs, amplify the differences. There, the names and shapes of weights, the names of metrics, and
the tokens of the first rollout must agree; each series' first value may differ by TOLERANCE, and digests and later
values are not compared.

After an intended change of numbers: python -m tests.golden.trajectories --write
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from .trajectories import GOLDEN, SCENARIOS, record_in_a_process

pytestmark = pytest.mark.slow
RECORDED = json.loads(GOLDEN.read_text())
TOLERANCE = dict(rel_tol=1e-3, abs_tol=1e-5)  # about a hundred times the effect of other vector instructions
EXACT = ("ids", "mask", "truncated", "turns", "faulty")  # fields of trajectories, which precede any training
# Metrics that must exceed 0 at least once, as proof that the scenario reaches the code that it covers.
EXERCISED = [
    ("GRPO", "reward"),
    ("GRPO", "clip_ratio/region_mean"),
    ("GRPO with a reference", "kl"),
    ("GRPO with LoRA", "kl"),
    ("DAPO", "dynamic_sampling/waiting"),
    ("CISPO", "cispo_clip_ratio"),
    ("CritiqueGRPO", "critique/sampled"),
    ("CritiqueGRPO", "critique/rescued_groups"),
    ("CritiqueGRPOReleased", "critique/rescued_groups"),
    ("SWEDapo", "tools/failure_frequency"),
    ("SWEDapo", "reward"),
    ("RejectionFineTune", "rejection/kept"),
    ("AttentionRL", "attention/divergence"),
    ("AttentionDistillation", "distillation/attention_divergence"),
    ("validate", "val/accuracy"),
    ("validate in an environment", "val/accuracy"),
]


@pytest.fixture(scope="module")
def current(tmp_path_factory):
    """Run all scenarios."""
    return record_in_a_process(tmp_path_factory.mktemp("golden") / "current.json")


def test_every_scenario_is_recorded():
    assert list(RECORDED["scenarios"]) == list(SCENARIOS)


@pytest.mark.parametrize(("name", "metric"), EXERCISED)
def test_scenarios_do_what_they_are_for(name, metric):
    assert max(map(float.fromhex, RECORDED["scenarios"][name]["metrics"][metric])) > 0


@pytest.mark.parametrize("name", SCENARIOS)
def test_nothing_changed(name, current):
    recorded, now = RECORDED["scenarios"][name], current["scenarios"][name]
    if current["machine"] == RECORDED["machine"]:
        before, after = dict(flat(recorded)), dict(flat(now))
        assert [path for path in before | after if before.get(path) != after.get(path)] == []
    elif "metrics" in recorded:
        assert_alike(recorded, now)
    else:
        assert {key: recorded[key] for key in EXACT} == {key: now[key] for key in EXACT}
        assert_close(floats(recorded["sampled_logps"]), floats(now["sampled_logps"]))


def assert_alike(recorded: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare runs from two machines."""
    series, current = ({**run["metrics"], "gradient_norms": run["gradient_norms"]} for run in (recorded, now))
    assert series.keys() == current.keys()
    assert recorded["sampled"][:1] == now["sampled"][:1]
    assert recorded["weights"]["names"] == now["weights"]["names"]
    for name, values in series.items():
        assert_close(floats(values[:1]), floats(current[name][:1]), name)


def assert_close(recorded: list[float], now: list[float], name: str = "") -> None:
    """Compare numbers up to rounding."""
    assert len(recorded) == len(now), name
    for before, after in zip(recorded, now, strict=True):
        assert math.isclose(before, after, **TOLERANCE), name


def floats(lines: list[str]) -> list[float]:
    """Parse hexadecimal floats."""
    return [float.fromhex(number) for line in lines for number in line.split()]


def flat(record: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a record with their paths."""
    parts = record.items() if isinstance(record, dict) else enumerate(record) if isinstance(record, list) else None
    if parts is None:
        yield path, record
        return
    for key, part in parts:
        yield from flat(part, f"{path}/{key}")
