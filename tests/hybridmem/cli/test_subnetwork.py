"""`hybridmem subnetwork` agrees with the Python functions for folders of any layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hybridmem.metrics import StoredWeights, subnetwork_overlap, update_masks, update_rank, update_sparsity
from tests.hybridmem.training.runs import hybridmem

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def folders(tmp_path):
    """Write a model, sharded into several files, and two models derived from it."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=11, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(tmp_path / "A", max_shard_size="20KB")
    for name in "BC":
        for key, parameter in model.named_parameters():
            parameter.data = start[key] + 0.1 * torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.3)
        model.save_pretrained(tmp_path / name)
    return [tmp_path / name for name in "ABC"]


def test_two_folders(folders, tmp_path, monkeypatch, capsys):
    files = ["--output", tmp_path / "out" / "found.json", "--save_mask", tmp_path / "mask.safetensors"]
    hybridmem(monkeypatch, "subnetwork", *folders[:2], *files)
    before, after = map(StoredWeights, folders[:2])
    expected = update_sparsity(before, after)
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    assert found["sparsity"]["by_tensor"] == expected.by_tensor
    assert found["sparsity"]["total"] == expected.total
    assert found["sparsity_at"]["1e-08"] == update_sparsity(before, after, 1e-8).total
    assert "overlap" not in found
    masks = load_file(tmp_path / "mask.safetensors")
    assert masks.keys() == before.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in update_masks(before, after))
    shown = capsys.readouterr().out
    assert f"{expected.total:.2%}" in shown
    assert f"{expected.by_kind['mlp.up_proj.weight']:.2%}" in shown
    layers = [line.split()[0] for line in shown.splitlines() if line.startswith("  model.layers")]
    assert layers == [f"model.layers.{n}" for n in range(11)]


def test_three_folders_and_ranks(folders, tmp_path, monkeypatch, capsys):
    options = ["--tolerance", "1e-3", "--dtype", "float32", "--rank", "true", "--output", tmp_path / "found.json"]
    hybridmem(monkeypatch, "subnetwork", *folders, *options)
    before, *others = map(StoredWeights, folders)
    masks = [dict(update_masks(before, other, 1e-3, torch.float32)) for other in others]
    expected = subnetwork_overlap(*masks)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["overlap"]["total"]["shares"] == expected.total.shares
    assert found["overlap"]["by_layer"]["model.layers.3"]["chance"] == expected.by_layer["model.layers.3"].chance
    assert found["rank"] == update_rank(before, others[0], torch.float32)
    assert found["sparsity_at"]["0.001"] == found["sparsity"]["total"]
    shown = capsys.readouterr().out
    for value in (*expected.total.shares, *expected.total.chance):
        assert f"{value:.1%}" in shown


def test_unchanged_tensors_have_no_overlap(folders, tmp_path, monkeypatch, capsys):
    hybridmem(monkeypatch, "subnetwork", folders[0], folders[0], folders[1], "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sparsity"]["total"] == 1
    assert found["overlap"]["total"]["shares"] == [None, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A"], "--after is required"),
        (["A", "B", "C", "A"], "subnetwork takes at most 3 folders, not 4: "),
        (["A", "missing"], "missing does not exist: give a Hugging Face folder"),
        (["A", "empty"], "holds neither model.safetensors nor model.safetensors.index.json"),
        (["A", "other.safetensors"], "only "),
        (["A", "B", "--tolerance", "-1"], "tolerance=-1.0 must be at least 0"),
        (["A", "B", "--output", "A/config.json/found.json"], "config.json"),
    ],
)
def test_errors_are_one_line(folders, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "subnetwork", *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hybridmem: error: ")
    assert message in error
