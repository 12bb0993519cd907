"""Saved weights are read one at a time and unchanged, and masks survive a round trip."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hybridmem.metrics import StoredWeights
from hybridmem.metrics.weights import is_float, write_masks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def model():
    shape = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.mark.parametrize("shard", ["10GB", "4KB"])
def test_a_folder_gives_its_models_weights(tmp_path, shard):
    written = model()
    written.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")
    stored, expected = StoredWeights(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert stored.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(stored[name], weight)
        assert stored.shapes[name] == weight.shape
        assert is_float(stored, name)


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2, dtype=torch.int64)}, tmp_path / "w.safetensors")
    stored = StoredWeights(tmp_path / "w.safetensors")
    monkeypatch.setattr(StoredWeights, "__getitem__", lambda *_: pytest.fail("read"))
    assert [*stored] == ["a", "b"]
    assert len(stored) == 2
    assert "a" in stored
    assert stored.keys() - {"a"} == {"b"}
    assert stored.shapes == {"a": (2, 3), "b": (2,)}
    assert stored.dtypes == {"a": "F32", "b": "I64"}


def test_masks_are_written_while_they_are_made(tmp_path):
    torch.manual_seed(0)
    masks = {
        "weight": torch.rand(5, 7) > 0.5,
        "a": torch.rand(3) > 0.5,
        "scalar": torch.tensor(True),
        "nothing": torch.zeros(0, 2, dtype=torch.bool),
        "turned": (torch.rand(4, 6) > 0.5).T,
    }
    path = tmp_path / "mask.safetensors"

    def made():
        for name, mask in masks.items():
            assert not path.exists()
            yield name, mask

    write_masks(path, {name: tuple(mask.shape) for name, mask in masks.items()}, made())
    read = load_file(path)
    assert read.keys() == masks.keys()
    for name, mask in masks.items():
        assert read[name].dtype == torch.bool
        assert torch.equal(read[name], mask)
    assert [file.name for file in tmp_path.iterdir()] == ["mask.safetensors"]


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist: give a Hugging Face folder"):
        StoredWeights(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"holds neither model.safetensors nor .*: save the model as safetensors"):
        StoredWeights(tmp_path)
    (tmp_path / "model.safetensors").write_text("no safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as safetensors"):
        StoredWeights(tmp_path)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"lacks two.safetensors, which its model.safetensors.index.json names"):
        StoredWeights(tmp_path)
