"""`hybridmem eval`, as a user calls it."""

import json
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hybridmem import HybridMemForCausalLM
from hybridmem.cli.eval import check_context, in_bytes, parse_lengths
from hybridmem.data import byte_tokenizer
from hybridmem.evaluate.cells import Cells
from tests.hybridmem.models import tiny_config
from tests.hybridmem.training.runs import hybridmem

ROWS = ["ruler/single", "ruler/frequent_words", "needle", "loss_by_position", "facts"]
ALL = ",".join(ROWS)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Files of lines of many words."""
    path = tmp_path_factory.mktemp("text")
    words = [
        f"{a}{b}{c}" for a in ("ab", "de", "lo") for b in ("ri", "st", "me", "on") for c in ("al", "er", "ing", "x")
    ]
    for n in range(40):
        lines = [" ".join(words[(n * 7 + line * 5 + k) % 48] for k in range(9)) + "." for line in range(40)]
        (path / f"{n}.txt").write_text("\n\n".join(lines))
    return path


@pytest.fixture(scope="module", params=["mag", "llama"])
def folder(request, tmp_path_factory):
    """A model with its tokenizer: one of ours, and one of transformers."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    if request.param == "mag":
        model = HybridMemForCausalLM(tiny_config(vocab_size=259, variant="mag"))
    else:
        shape = dict(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(**shape))
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def evaluate(monkeypatch, model, output, text, *options, tasks=ALL):
    paths = ["--model", model, "--output", output, "--path", text, "--pattern", "*.txt"]
    sizes = ["--num_samples", 2, "--max_new_tokens", 3]
    hybridmem(monkeypatch, "eval", *paths, "--tasks", tasks, *sizes, *options)


def test_cells_table_and_heat_map(folder, text, tmp_path, monkeypatch, capsys):
    evaluate(monkeypatch, folder, tmp_path, text, "--lengths", "700,1k")
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["cells"]) == {f"{row}@{length}" for row in ROWS for length in (700, 1024)}
    for cell in results["cells"].values():
        assert cell["state_bytes"] > 0
        assert cell["seconds"] > 0
        assert 0.9 * cell["length"] < cell["tokens"] <= cell["length"]
        assert 0 <= cell["score"] <= (1 if cell["task"] != "loss_by_position" else 20)
    assert set(results["cells"]["loss_by_position@1024"]["by_position"]) == {"[0,256)", "[256,∞)"}
    assert len(results["cells"]["needle@700"]["samples"]) == 2
    assert results["cells"]["ruler/single@1024"]["tokens"] == 1024
    assert (tmp_path / "heat_map.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.count(" at 700: ") == len(ROWS)
    assert "bits per byte" in out

    evaluate(monkeypatch, folder, tmp_path, text, "--lengths", "700,900", tasks="needle")
    out = capsys.readouterr().out
    assert "needle at 900: " in out
    assert "needle at 700: " not in out  # a finished cell is kept
    assert set(json.loads((tmp_path / "results.json").read_text())["cells"]) == {*results["cells"], "needle@900"}

    with pytest.raises(SystemExit):
        evaluate(monkeypatch, folder, tmp_path, text, "--lengths", "700", "--seed", 3)
    assert "holds results of seed=0, and this run has 3" in capsys.readouterr().err


def test_interrupted_cells_are_measured_again(folder, text, tmp_path, monkeypatch):
    options = ("--lengths", "700")
    evaluate(monkeypatch, folder, tmp_path / "whole", text, *options, tasks="needle,facts")
    monkeypatch.setattr("hybridmem.tasks.Facts.reward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(monkeypatch, folder, tmp_path / "cut", text, *options, tasks="needle,facts")
    monkeypatch.undo()
    evaluate(monkeypatch, folder, tmp_path / "cut", text, *options, tasks="needle,facts")
    whole, cut = (json.loads((tmp_path / name / "results.json").read_text())["cells"] for name in ("whole", "cut"))
    assert {key: cell["samples"] for key, cell in whole.items()} == {key: cell["samples"] for key, cell in cut.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "recall"], "tasks: 'recall' is unknown; choose among ruler, needle"),
        (["--lengths", "4q"], "'4q' is not a length; write 4096, 4k or 1m"),
        (["--lengths", "100"], "num_tokens=100 is too short for subtask single"),
        (["--lengths", "20", "--tasks", "needle"], "lengths=20 for task needle"),
        (["--lengths", "100", "--tasks", "facts"], "lengths: 100 tokens are too short for task facts"),
        (["--lengths", "1m", "--tasks", "loss_by_position"], "the held-out text has .* tokens: lower lengths, or set"),
        (["--device", "tpu9"], "device='tpu9' cannot be used"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_errors_before_the_first_cell(folder, text, tmp_path, monkeypatch, capsys, options, message):
    settings = {
        "--tasks": "ruler/single",
        "--lengths": "700",
        "--model": folder,
        **dict(zip(*[iter(options)] * 2, strict=True)),
    }
    arguments = [part for pair in settings.items() for part in pair]
    with pytest.raises(SystemExit, match="2"):
        hybridmem(monkeypatch, "eval", "--output", tmp_path, "--path", text, "--pattern", "*.txt", *arguments)
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
    assert not (tmp_path / "results.json").exists()


def test_learned_positions_bound_the_lengths():
    config = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=8, n_layer=1, n_head=1, vocab_size=9)).config
    check_context("gpt2", config, 64)
    with pytest.raises(ValueError, match="model=gpt2 has 64 positions: lengths with max_new_tokens need 65"):
        check_context("gpt2", config, 65)
    check_context("llama", LlamaConfig(max_position_embeddings=64), 65)


def test_lengths_and_bytes():
    assert parse_lengths("16k, 4K,500,1m") == [500, 4096, 16384, 1 << 20]
    assert [in_bytes(count) for count in (12, 3456, 7_890_000, 12e9)] == ["12 B", "3.46 kB", "7.89 MB", "12 GB"]


def test_a_cache_is_extrapolated(tmp_path):
    cells = Cells(tmp_path, {})
    assert cells.needed_bytes(1000) == 0
    for tokens, size, growth in ((100, 500, 5), (200, 900, 4)):
        cells.add("needle", tokens, {"score": 1, "tokens": tokens, "state_bytes": size, "bytes_per_token": growth})
    assert cells.needed_bytes(1000) == 900 + 4 * 800
    assert cells.needed_bytes(150) == 500 + 5 * 50


def test_a_cell_that_does_not_fit_is_skipped(folder, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hybridmem.cli.eval.free_bytes", lambda device: 1.0)
    evaluate(monkeypatch, folder, tmp_path, text, "--lengths", "500,1k", tasks="needle")
    out = capsys.readouterr().out
    assert "needle at 500: " in out
    assert "needle at 1k: skipped, needs" in out
    monkeypatch.undo()
    evaluate(monkeypatch, folder, tmp_path, text, "--lengths", "500,1k", tasks="needle")
    assert "needle at 1k: 0 %" in capsys.readouterr().out
