"""Grids from the command line: running, recording failures, resuming, and rejecting changed settings."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

from hybridmem.compare import runs
from hybridmem.compare.runs import status
from tests.hybridmem.training.policy.test_allocation import config_of
from tests.hybridmem.training.runs import hybridmem
from tests.several import Forked

from .test_grid import CONFIGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
TINY = dict(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    memory_heads=1,
    memory_head_dim=8,
)
SMALL = {"data.init_args.batch_size": 4, "data.init_args.num_val": 4, "trainer.val_check_interval": 1}


def write_grid(folder, **changes):
    grid = {
        "output": str(folder / "grid"),
        "tasks": {
            "recall": {
                "warm_up": str(CONFIGS / "recall_warmup.yaml"),
                "train": str(CONFIGS / "recall.yaml"),
                "architectures": {"mag": {"variant": "mag", **TINY}},
                "controls": {
                    "supervised": [{"class_path": "hybridmem.rl.SFT"}],
                    "broken": [{"class_path": "hybridmem.rl.AttentionRL", "init_args": {"target": "gaze"}}],
                },
                "seeds": [0],
                "warm_up_options": {"model.init_args.lr_scheduler.init_args.warmup_steps": 1},
                "train_options": {
                    "model.init_args.num_generations": 2,
                    "model.init_args.lr_scheduler.init_args.warmup_steps": 1,
                },
                "options": {"trainer.max_steps": 4, **SMALL, **changes},
            }
        },
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid))
    return path


@pytest.fixture
def forked_runs(monkeypatch):
    """Fork the processes of a grid's runs; those of a stopped grid below import everything again, as a user's do."""
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(Popen=Forked))


@pytest.mark.usefixtures("forked_runs")
def test_a_grid_runs_records_failures_and_resumes(tmp_path, monkeypatch, capsys):
    config = write_grid(tmp_path)
    hybridmem(monkeypatch, "compare", "--config", config)
    results = json.loads((tmp_path / "grid" / "results.json").read_text())
    cells = {cell["label"]: cell for cell in results["tasks"]["recall"]["cells"]}
    assert {label: cell["status"] for label, cell in cells.items()} == {
        "start": "finished",
        "supervised": "finished",
        "broken on gaze": "failed",
    }
    assert "gaze" in cells["broken on gaze"]["reason"]
    assert cells["supervised"]["compute"]["steps"] == 4
    rows = {row["label"]: row for row in results["tasks"]["recall"]["summary"]}
    assert 0 <= rows["supervised"]["sparsity"]["mean"] < 1
    assert any(name.startswith("distance=") for name in rows["supervised"]["accuracy_at"])
    assert str(tmp_path / "grid" / "report.html") in capsys.readouterr().out

    output = tmp_path / "grid" / "recall" / "mag" / "supervised" / "seed0" / "output.txt"
    before = output.stat().st_mtime_ns
    hybridmem(monkeypatch, "compare", "--config", config, "--list_runs", "true")
    assert "finished recall mag supervised seed 0" in capsys.readouterr().out
    failed = tmp_path / "grid" / "recall" / "mag" / "broken-on-gaze" / "seed0" / "output.txt"
    tried = failed.stat().st_mtime_ns
    hybridmem(monkeypatch, "compare", "--config", config, "--report_only", "true")
    assert failed.stat().st_mtime_ns == tried
    again = json.loads((tmp_path / "grid" / "results.json").read_text())
    assert again["command"] == results["command"]

    assert results["environments"] == again["environments"]
    assert [environment["packages"]["torch"] for environment in results["environments"]] == [torch.__version__]
    elsewhere = tmp_path / "grid" / "recall" / "mag" / "start" / "seed0" / "environment.json"
    elsewhere.write_text(json.dumps({"cores": 64}))
    (output.parent / "environment.json").unlink()
    hybridmem(monkeypatch, "compare", "--config", config, "--report_only", "true")
    mixed = json.loads((tmp_path / "grid" / "results.json").read_text())
    made_with = {c["label"]: c.get("environment") for c in mixed["tasks"]["recall"]["cells"]}
    assert made_with == {"start": 1, "supervised": 2, "broken on gaze": None}
    assert mixed["environments"] == [*results["environments"], {"cores": 64}, None]
    page = (tmp_path / "grid" / "report.html").read_text()
    assert page.count("Versions and machine of 1 run<") == 3
    assert "not recorded" in page
    hybridmem(monkeypatch, "report", tmp_path / "grid")
    hybridmem(monkeypatch, "compare", "--config", config, "--only", "2")
    assert output.stat().st_mtime_ns == before

    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "compare", "--config", write_grid(tmp_path, **{"data.init_args.num_val": 2}))
    assert "holds a run with other settings" in capsys.readouterr().err


@pytest.mark.usefixtures("forked_runs")
def test_a_grid_of_allocations_starts_from_converted_models(tmp_path, monkeypatch):
    """The start and fixed orders are validated, a learned allocation is trained, and all give a curve."""
    train = config_of(tmp_path, model__init_args__dtype="bfloat16", trainer__max_steps=2, trainer__val_check_interval=2)
    settings = {"source": None, "attention_window": 4, "budget": 0.5}
    curve = {"class_path": "hybridmem.training.AllocationCurve", "init_args": {"closed": [0.0, 0.5, 1.0]}}
    task = {
        "warm_up": None,
        "train": str(train),
        "architectures": {"window": {"model.init_args.model": str(tmp_path / "policy")}},
        "controls": {
            name: [{"class_path": f"hybridmem.rl.{objective}", "init_args": settings}]
            for name, objective in (("random heads", "FixedAllocation"), ("reward", "AllocationRL"))
        },
        "seeds": [0],
        "train_options": {"trainer.callbacks+": [curve]},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "grid"), "tasks": {"facts": task}}))
    hybridmem(monkeypatch, "compare", "--config", tmp_path / "grid.yaml")
    found = json.loads((tmp_path / "grid" / "results.json").read_text())["tasks"]["facts"]
    cells = {cell["label"]: cell for cell in found["cells"]}
    assert {label: cell["status"] for label, cell in cells.items()} == dict.fromkeys(cells, "finished"), cells
    assert list(cells) == ["start", "random heads", "reward"]
    assert [label for label, cell in cells.items() if "compute" in cell] == ["reward"]
    curves = {row["label"]: list(row["accuracy_at"]) for row in found["summary"]}
    shares = ["closed=0", "closed=0.5", "closed=1"]
    assert curves == {"start": [], "random heads": shares, "reward": shares}
    hybridmem(monkeypatch, "compare", "--config", tmp_path / "grid.yaml")  # nothing is left to run
    assert "Accuracy by closed" in (tmp_path / "grid" / "report.html").read_text()


def test_a_stopped_grid_lets_its_runs_save(tmp_path):
    endless = {"trainer.max_steps": 100_000, "trainer.val_check_interval": 100_000}
    config = write_grid(tmp_path, **endless)
    command = [sys.executable, "-m", "hybridmem", "compare", "--config", config]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    folder = tmp_path / "grid" / "recall" / "mag" / "warm-up" / "seed0"
    deadline = time.monotonic() + 300
    while not list(folder.glob("step=*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGINT
    assert (folder / "interrupted.ckpt").exists()
    assert status(folder) == "missing"


def test_a_cell_waits_for_its_warm_up(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "compare", "--config", write_grid(tmp_path), "--only", "1")
    assert "execute that run first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "compare", "--config", write_grid(tmp_path), "--only", "9")
    assert "only=9 must be between 0 and 3" in capsys.readouterr().err


def test_a_report_needs_results(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "report", "--run_dir", tmp_path)
    assert "has no results.json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "compare", "--config", write_grid(tmp_path), "--report_only", "true")
    assert "does not exist, so there is no run to report" in capsys.readouterr().err
