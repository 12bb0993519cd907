"""A small part of the fault drill and the fuzzing; the scripts run all of it."""

import importlib
import json
import random
import subprocess
import sys
from functools import partial
from itertools import chain

import pytest

from tests.unchecked import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module


@pytest.mark.slow
def test_faults_lose_nothing(tmp_path):
    figures = tmp_path / "figures.json"
    sizes = dict(batches=12, kills=2, times=2, reads=40, seed=1, output=figures)
    options = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    # Groups that wait are resumed in tests/hybridmem/training/policy/test_group_buffer.py, too.
    options += ["--faults", "kill", "drop", "terminate", "within", "fill", "tmpfs", "damage", "spoil", "corrupt"]
    # A separate process, because the drill forks and needs a fresh parent.
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "fault_drill.py", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert not found["failures"]
    assert found["faults"]["SIGKILL"]["kills"] == 2
    assert found["faults"]["SIGKILL"]["resumed to the same bits"] >= 1
    for strategy in ("DDP", "FSDP2"):
        assert sum(found["faults"][f"a process of two killed, {strategy}"].values()) >= 2
    for runs in ("one process", "DDP", "FSDP2"):
        assert found["faults"][f"resumed amid an accumulation, {runs}"] == {"resumed to the same bits": 2}
    assert found["faults"]["exception while accumulating"]["resumed to the same bits"] >= 1
    assert found["faults"]["damaged checkpoint, read"]["refused"] > 20
    assert found["faults"]["NaN batch, skip"]["skipped, counted, trained to the end"] == 1


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
