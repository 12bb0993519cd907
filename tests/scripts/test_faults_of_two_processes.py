"""Faults of runs in two processes and amid an accumulation; scripts/fault_drill.py repeats them more often."""

import pytest

from .drill import drilled

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return drilled(tmp_path_factory.mktemp("drill"), 1, "drop", "within")


def test_a_process_of_two_is_lost(found):
    for strategy in ("DDP", "FSDP2"):
        assert sum(found[f"a process of two killed, {strategy}"].values()) >= 2


def test_runs_resume_amid_an_accumulation(found):
    for runs in ("one process", "DDP", "FSDP2"):
        assert found[f"resumed amid an accumulation, {runs}"] == {"resumed to the same bits": 1}
    assert found["exception while accumulating"]["resumed to the same bits"] >= 1
