"""Order of runs, and the effect of a failed warm-up on its cells."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from hybridmem.compare import runs
from hybridmem.compare.grid import FitOptions, plan
from hybridmem.compare.runs import FAILED, FINISHED, ON_ONE_THREAD, devices, execute_all, held, status

from .test_grid import RECALL


@pytest.fixture
def made(monkeypatch):
    """Record the executed runs in order; the runs in `failing` fail."""
    order, failing = [], set()

    def execute(run, task, root: Path, environment, running):
        folder = root / run.folder
        time.sleep(0.05)  # keep an earlier failure's state a moment longer
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILED).unlink(missing_ok=True)
        (folder / (FAILED if str(run) in failing else FINISHED)).write_text("it broke")
        order.append(str(run))
        return status(folder)

    monkeypatch.setattr(runs, "execute", execute)
    return order, failing


def execute_plan(root, task=RECALL, parallel=1):
    """Execute the unfinished runs; return the status of each."""
    warm_ups, cells = plan({"recall": task})
    waiting = [run for run in [*warm_ups, *cells] if status(root / run.folder) != "finished"]
    ended = {}
    execute_all(waiting, {"recall": task}, root, parallel, lambda run, state: ended.update({str(run): state}))
    return ended


def test_processes_are_for_gpus_where_a_run_asks_for_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(5))

    def environments(task):
        warm_ups, cells = plan({"recall": task})
        return devices([*warm_ups, *cells], {"recall": task}, Path("runs"))

    on_gpus = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    cpu, gpu = (FitOptions({"trainer.accelerator": kind}) for kind in ("cpu", "gpu"))
    assert environments(RECALL) == [ON_ONE_THREAD] * 5
    assert environments(replace(RECALL, options=gpu)) == on_gpus
    assert environments(replace(RECALL, warm_up_options=gpu)) == on_gpus
    assert environments(replace(RECALL, options=gpu, warm_up_options=cpu)) == on_gpus
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert environments(replace(RECALL, options=gpu)) == [ON_ONE_THREAD] * 5


def test_cells_come_after_their_warm_up(tmp_path, made):
    ended = execute_plan(tmp_path)
    order, _ = made
    assert set(ended.values()) == {"finished"}
    assert len(order) == len(set(order)) == len(ended)
    for cell in plan({"recall": RECALL})[1]:
        assert order.index(str(cell.warm_up)) < order.index(str(cell))


def test_cells_fail_with_their_warm_up_and_run_once_it_is_mended(tmp_path, made):
    order, failing = made
    failing.add("recall mag warm-up seed 1")
    ended = execute_plan(tmp_path)
    lost = [name for name, state in ended.items() if state == "failed"]
    assert len(lost) == 1 + 5
    assert all(name.startswith("recall mag") and name.endswith("seed 1") for name in lost)
    reason = (tmp_path / "recall/mag/token/seed1" / FAILED).read_text()
    assert reason == "its warm-up failed: it broke\n"
    failing.clear()
    order.clear()
    assert execute_plan(tmp_path) == dict.fromkeys(lost, "finished")
    assert order[0] == "recall mag warm-up seed 1"


def test_a_masked_run_waits_for_the_run_that_makes_its_mask(tmp_path, made):
    order, failing = made
    task = replace(RECALL, masked=["token"], seeds=[0])
    failing.add("recall mag token seed 0")
    ended = execute_plan(tmp_path, task, parallel=2)
    assert ended["recall swa token, masked seed 0"] == "finished"
    assert order.index("recall swa token seed 0") < order.index("recall swa token, masked seed 0")
    assert ended["recall mag token, masked seed 0"] == "failed"
    reason = (tmp_path / "recall/mag/token-masked/seed0" / FAILED).read_text()
    assert reason == "the run of 'token' failed: it broke\n"
    failing.clear()
    assert set(execute_plan(tmp_path, task, parallel=2).values()) == {"finished"}


def test_two_processes_do_not_make_the_same_run(tmp_path):
    warm_ups, cells = plan({"recall": RECALL})
    with held(warm_ups, tmp_path):
        with pytest.raises(ValueError, match="is running recall swa warm-up seed 0 there"):
            held([cells[0], warm_ups[0]], tmp_path).__enter__()
        with held(cells, tmp_path):
            pass
    with held(warm_ups, tmp_path):
        pass
    assert status(tmp_path / warm_ups[0].folder) == "missing"
