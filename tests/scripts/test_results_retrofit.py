"""The retrofit results: configs of the stages, and tables over seeds."""

import importlib
import json

import pytest

from tests.unchecked import ROOT


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("results_retrofit")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "DATA", tmp_path / "retrofit.json")
    return module


def row(cell, stage, seed, nats, exact, window=64):
    answers = {"400": {"exact": exact, "prompts": 4, "tokens": 430, "read seconds": 1.0}}
    answers["400"] |= {"seconds per token": 0.1, "state bytes": 2e6}
    both = {"beyond window": nats, "beyond 128": nats}
    return {"window": window, "cell": cell, "stage": stage, "seed": seed, "nats": both, "answers": answers}


def put(script, measured):
    script.put_row(script.DATA, measured, script.KEY)


def test_later_stages_start_from_the_stage_before_on_other_texts(script):
    first = script.settings(script.Run("no feature maps", "regression", 1), "base")
    later = script.settings(script.Run("no feature maps", "lora", 1), "base")
    assert later["model"]["init_args"]["base"] == "runs/results_retrofit/no_feature_maps/regression/1/step=300.ckpt"
    assert later["model"]["init_args"]["frozen"] == first["model"]["init_args"]["frozen"] == ["q_map.*", "k_map.*"]
    assert later["model"]["init_args"]["stage"] == "kl"
    assert later["model"]["init_args"]["lora"]["r"] == 8
    seeds = [[part["init_args"]["seed"] for part in each["data"]["init_args"]["parts"]] for each in (first, later)]
    assert seeds == [[1, 1], [11, 11]]


def test_tables_give_the_recovered_share_over_seeds(script):
    put(script, row("full", "", 0, 1.0, 0.75))
    put(script, row("window", "", 0, 2.0, 0.25))
    for seed, nats in enumerate((1.4, 1.5, 1.6)):
        put(script, row("plain", "regression", seed, nats, 0.5))
    _, full, window, plain = script.likelihoods()[:4]
    assert full[:5] == ["full", "64", "1", "1.000", "100 %"]
    assert window[4] == "0 %"
    assert plain[:5] == ["plain regression", "64", "3", "1.500 ± 0.248", "50 ± 25 %"]
    assert script.exact_answers()[3] == ["plain regression", "64", "50 ± 0 %", "", ""]


def test_a_measured_row_replaces_its_predecessor(script):
    put(script, row("plain", "kl", 0, 1.4, 0.5))
    put(script, row("plain", "kl", 0, 1.3, 0.5))
    (kept,) = json.loads(script.DATA.read_text())["rows"]
    assert kept["nats"]["beyond window"] == 1.3
    assert script.row_of(64, script.Run("plain", "kl", 0)) == kept
    assert script.row_of(64, script.Run("plain", "kl", 1))["answers"] == {}


def test_tables_need_full_attention_with_the_same_window(script):
    put(script, row("full", "", 0, 1.0, 0.75))
    put(script, row("plain", "lora", 0, 1.4, 0.5))
    with pytest.raises(SystemExit, match="window with window 64 not measured"):
        script.likelihoods()
