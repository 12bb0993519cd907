"""A small part of the fault drill and the fuzzing; the scripts run all of it."""

import importlib
import random
from functools import partial
from itertools import chain

import pytest

from tests.unchecked import ROOT

from .drill import drilled

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module


@pytest.mark.slow
def test_faults_lose_nothing(tmp_path):
    found = drilled(tmp_path, 2, "kill", "terminate", "fill", "tmpfs", "damage", "spoil", "corrupt")
    assert found["SIGKILL"]["kills"] == 2
    assert found["SIGKILL"]["resumed to the same bits"] >= 1
    assert found["damaged checkpoint, read"]["refused"] > 20
    assert found["NaN batch, skip"]["skipped, counted, trained to the end"] == 1


def test_groups_that_wait_are_drilled(script, tmp_path):
    fault_drill = script("fault_drill")
    drill = fault_drill.Drill(tmp_path, 0, fault_drill.WAITING_STEPS, waiting=True)
    fault_drill.resume_with_waiting_groups(drill, 1, "waiting")
    assert drill.counts == {"waiting": {"resumed to the same bits": 1}}
    assert not drill.failures
    for path in (tmp_path / "reference").glob("within*.ckpt"):
        path.unlink()
    fault_drill.resume_with_waiting_groups(drill, 1, "waiting")
    assert drill.failures == ["waiting: no group waits in any of 0 checkpoints"]


@pytest.mark.slow
def test_broken_settings_and_files_are_taken_or_named(script, tmp_path):
    fuzz = script("fuzz")
    fuzz.write_data(tmp_path)
    fuzz.byte_level_bpe(tmp_path)
    base = fuzz.complete(ROOT / "configs" / "quickstart.yaml", tmp_path)
    sound = fuzz.Case("as it is", [], partial(fuzz.fit, base, tmp_path))
    assert fuzz.outcome(sound)[0] == "accepted"
    numbers = random.Random(0)
    settings = fuzz.settings_cases(6, tmp_path, numbers, {"quickstart.yaml": base})
    cases = chain(settings, fuzz.file_cases(15, tmp_path, numbers))
    found = {case.what: fuzz.outcome(case) for case in cases}
    bad = {what: said for what, said in found.items() if said[0] not in ("accepted", "refused, naming the cause")}
    assert not bad
    assert {outcome for outcome, _ in found.values()} == {"accepted", "refused, naming the cause"}


def test_tracebacks_and_lines_without_a_cause_are_distinguished(script):
    fuzz = script("fuzz")

    def unnamed():
        raise fuzz.SettingsError("something is wrong")

    def crash():
        raise ZeroDivisionError

    assert fuzz.outcome(fuzz.Case("", ["batch_size"], unnamed))[0] == "refused without the cause"
    assert fuzz.outcome(fuzz.Case("", ["something"], unnamed))[0] == "refused, naming the cause"
    assert fuzz.outcome(fuzz.Case("", [], crash))[0] == "traceback"
