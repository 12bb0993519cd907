"""Cells of the allocation benchmark: states shrink, and a second run measures only missing cells."""

import importlib
import json
import os

import pytest
import torch

from hybridmem.convert import Allocation
from tests.hybridmem.convert.bases import base_model
from tests.unchecked import ROOT


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("bench_allocation")
    monkeypatch.setattr(module, "in_own_process", module.measure)
    monkeypatch.setattr(module, "DECODED", 3)
    return module


@pytest.fixture
def options(tmp_path):
    base_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    Allocation("base", 8, 2, [["full", "none"], ["memory", "none"]]).save(tmp_path / "learned.json")
    common = dict(
        model=tmp_path / "base", output=tmp_path / "data" / "out.json", window=8, sinks=2, piece=32, threads=1
    )
    return [f"--{name}={value}" for name, value in common.items()] + ["--allocations", str(tmp_path / "learned.json")]


def rows(tmp_path):
    return json.loads((tmp_path / "data" / "out.json").read_text())["rows"]


def test_every_model_is_measured_at_every_length(bench, options, tmp_path, capsys):
    bench.main([*options, "--closed", "0.5", "--lengths", "64", "192"])
    assert [(row["tokens"], row["model"]) for row in rows(tmp_path)] == [
        (tokens, name) for tokens in (64, 192) for name in ("full", "50% none", "50% memory", "learned")
    ]
    state = {(row["model"], row["tokens"]): row["state_mb"] * 2**20 for row in rows(tmp_path)}
    key_and_value = 2 * 8 * 2  # a head's channels, in bfloat16
    growth = {name: round(state[name, 192] - state[name, 64]) for name in ("full", "50% none", "learned")}
    heads = {name: bytes_ / 128 / key_and_value for name, bytes_ in growth.items()}
    assert heads == pytest.approx({"full": 4, "50% none": 2, "learned": 1}, rel=0.1)
    assert all(row["decode_ms_per_token"] > 0 < row["prefill_ms_per_token"] for row in rows(tmp_path))
    assert {row["model"]: row["closed"] for row in rows(tmp_path)} == {
        "full": 0,
        "50% none": 0.5,
        "50% memory": 0.5,
        "learned": 0.75,
    }
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 9
    assert table[1].split()[:2] == ["64", "full"]
    assert table[1].split()[-3:] == ["1.00"] * 3


def test_a_second_run_measures_missing_cells_alone(bench, options, tmp_path, monkeypatch):
    bench.main([*options, "--closed", "0.5", "--sources", "none", "--lengths", "64"])
    before, measured = rows(tmp_path), []

    def counting(model, allocation, tokens, *rest):
        measured.append((round(allocation.closed, 2), tokens))
        return dict.fromkeys(before[0].keys() - {"model", "closed", "tokens", "sources"}, 1)

    monkeypatch.setattr(bench, "in_own_process", counting)
    bench.main([*options, "--closed", "0.5", "0.75", "--sources", "none", "--lengths", "64", "96"])
    assert measured == [(0.75, 64), (0.0, 96), (0.5, 96), (0.75, 96), (0.75, 96)]
    assert rows(tmp_path)[: len(before)] == before
    with pytest.raises(ValueError, match="holds rows with other settings"):
        bench.main([*options, "--window", "9"])


def test_random_allocations_are_nested_in_their_seed(bench):
    config = base_model().config
    settings = bench.Settings("base", 8, 2, 32, 1)
    drawn = [
        bench.random_allocation(config, 0.5, source, settings, bench.random.Random(0)) for source in ("none", "memory")
    ]
    assert drawn[0].closed == drawn[1].closed == 0.5
    assert bench.code(drawn[0]).replace("n", "m") == bench.code(drawn[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks in processes with threads, such as pytest's
def test_a_cell_runs_in_a_process_of_its_own(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("bench_allocation")
    monkeypatch.setattr(module, "measure", os.getpid)
    assert module.in_own_process() != os.getpid()
