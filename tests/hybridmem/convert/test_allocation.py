"""Allocations as files, applied to models, folders and checkpoints."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache

from hybridmem import HybridMemForCausalLM
from hybridmem.convert import Allocation, allocate, convert, convert_folder
from hybridmem.convert.memories import add_memories
from hybridmem.data import byte_tokenizer
from hybridmem.model.cache import state_bytes
from tests.hybridmem.convert.bases import base_model, texts
from tests.hybridmem.models import tiny_model
from tests.hybridmem.training.runs import hybridmem

WINDOW, SINKS = 8, 2
SETTINGS = dict(attention_window=WINDOW, num_sink_tokens=SINKS)
NONE = [["full", "none"], ["none", "none"]]
MEMORY = [["none", "full"], ["full", "memory"]]


def allocation(sources=None, **changes):
    sources = NONE if sources is None else sources
    return Allocation(**dict(model="llama", **SETTINGS, head_sources=sources, trained={"seed": 3}) | changes)


def with_memories(dtype=torch.float32, family="llama"):
    """A converted model whose memories take part in every output."""
    model = convert(base_model(family, dtype=dtype), **SETTINGS, head_source="memory")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "allocation.json"
    allocation(MEMORY).save(path)
    return path


def test_a_file_holds_an_allocation(file):
    assert Allocation.load(file) == allocation(MEMORY)
    values = json.loads(file.read_text())
    assert values.pop("closed") == 0.5
    assert values == dict(model="llama", **SETTINGS, head_sources=MEMORY, trained={"seed": 3})
    assert '  ["none", "full"],\n  ["full", "memory"]\n' in file.read_text()


def test_a_file_of_nothing_but_sources_and_window_is_enough(file):
    values = json.loads(file.read_text())
    del values["closed"], values["trained"]
    file.write_text(json.dumps(values))
    assert Allocation.load(file) == allocation(MEMORY, trained={})


BROKEN = {
    "is not JSON": "{",
    "holds a list: write an object with head_sources": "[]",
    "lacks head_sources: add it": dict(head_sources=None),
    "lacks attention_window: add it": dict(attention_window=None),
    "holds 'budget', which is unknown: remove it, or move it into trained": dict(budget=1),
    "attention_window='8' must be of type int": dict(attention_window="8"),
    "attention_window=True must be of type int": dict(attention_window=True),
    "attention_window=0 must be at least 1": dict(attention_window=0),
    "num_sink_tokens=-1 must be at least 0": dict(num_sink_tokens=-1),
    "head_sources must hold a list of sources for each layer": dict(head_sources=["full", "none"]),
    "head_sources[1][0]='some' is unknown: choose one of full, memory, none": dict(head_sources=[["full"], ["some"]]),
    "closed=0.9 but 2 of 4 heads are not full: correct closed or head_sources": dict(closed=0.9),
    "closed='half' but 2 of 4": dict(closed="half"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_files_are_named(message, file):
    change = BROKEN[message]
    if isinstance(change, dict):
        values = json.loads(file.read_text()) | change
        change = json.dumps({name: value for name, value in values.items() if value is not None})
    file.write_text(change)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Allocation.load(file)
    assert str(error.value).startswith(f"allocation={file}")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"allocation=.*nowhere\.json does not exist: name a JSON file"):
        Allocation.load(tmp_path / "nowhere.json")


@torch.no_grad()
def test_a_base_model_gets_the_sources():
    base = base_model(dtype=torch.float32)
    expected = convert(base, **SETTINGS, head_source=NONE)
    found = convert(base, allocation=allocation())
    assert found.config.head_sources == NONE
    assert found(texts()).logits.equal(expected(texts()).logits)
    assert not found(texts()).logits.equal(convert(base, **SETTINGS)(texts()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral sliding"])
def test_a_converted_model_keeps_the_memories_that_it_reads(family):
    model = with_memories(family=family)
    with model.head_sources(MEMORY):
        expected = model(texts()).logits
    found = convert(model, allocation=allocation(MEMORY))
    assert found(texts()).logits.equal(expected)
    assert [layer.mixer.memory is not None for layer in found.model.layers] == [False, True]
    assert model.config.head_sources == [["memory"] * 2] * 2
    allocate(model, allocation(MEMORY))
    assert model(texts()).logits.equal(expected)
    assert model.state_dict().keys() == found.state_dict().keys()


@torch.no_grad()
def test_folders_are_converted_by_the_command(tmp_path, file, monkeypatch):
    model = with_memories(family="llama tied")
    sources = [["none", "full", "none", "full"], ["full", "memory", "memory", "none"]]
    allocation(sources).save(file)
    model.save_pretrained(tmp_path / "retrofitted")
    byte_tokenizer().save_pretrained(tmp_path / "retrofitted")
    with model.head_sources(sources):
        expected = model(texts()).logits
    command = ["convert", "--model", tmp_path / "retrofitted", "--allocation", file, "--output", tmp_path / "out"]
    hybridmem(monkeypatch, *map(str, command))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded(texts()).logits.equal(expected)
    assert loaded.config.head_sources == sources
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert {name.split(".")[2] for name in weights.keys() if ".memory." in name} == {"1"}  # noqa: SIM118
    assert Allocation.load(tmp_path / "out" / "allocation.json") == allocation(sources)
    again = convert(tmp_path / "out", allocation=tmp_path / "out" / "allocation.json")
    assert again(texts()).logits.equal(expected)


@torch.no_grad()
def test_our_own_models_take_allocations():
    kinds = ["mah", "mag"]
    model = tiny_model(layer_types=kinds, head_sources=[["memory", "full"], []], num_sink_tokens=SINKS)
    sources = [["full", "none"], []]
    with model.head_sources(sources):
        expected = model(texts() % 37).logits
    found = convert(model, allocation=allocation(sources, attention_window=model.config.attention_window))
    assert found(texts() % 37).logits.equal(expected)
    assert found.model.layers[0].mixer.memory is None
    assert found.model.layers[1].mixer.memory is not None
    with pytest.raises(
        ValueError, match=r"the allocation names 2 layers of 2 KV heads but the model has 2 layers of 0 or 2"
    ):
        convert(model, allocation=allocation())


REFUSED = {
    "names 1 layers of 2 KV heads but the model has 2 layers of 2 KV heads: choose an allocation of this model (it "
    "was made for 'llama')": dict(sources=[["full", "none"]]),
    "names 2 layers of 2 or 3 KV heads": dict(sources=[["full", "none"], ["full"] * 3]),
    "names memory in layer 1, where the model has no memory: fit memories first (docs/retrofit.md)": dict(
        sources=MEMORY
    ),
    "attention_window=300 is longer than the model's context of 256 tokens": dict(attention_window=300),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("converted", [False, True])
def test_models_that_do_not_fit_are_refused(message, converted):
    base = base_model(dtype=torch.float32)
    model = convert(base, **SETTINGS) if converted else base
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        convert(model, allocation=allocation(**REFUSED[message]))
    assert "\n" not in str(error.value)


def test_memories_keep_their_window():
    model = with_memories()
    wide = allocation(MEMORY, attention_window=16)
    message = "has attention_window=16 and num_sink_tokens=2 but the model's memories were fitted to 8 and 2"
    for apply in (allocate, lambda model, wide: convert(model, allocation=wide)):
        with pytest.raises(ValueError, match=message):
            apply(model, wide)
    assert convert(model, allocation=wide, attention_window=8).config.attention_window == 8
    assert convert(model, allocation=allocation(attention_window=16)).config.attention_window == 16
    allocate(model, allocation(attention_window=16))
    assert model.config.attention_window == 16


def test_settings_that_exclude_each_other(tmp_path):
    base = base_model(dtype=torch.float32)
    with pytest.raises(ValueError, match="head_source='none' and an allocation exclude each other: leave one"):
        convert(base, allocation=allocation(), head_source="none")
    with pytest.raises(ValueError, match="memory_depth=2 and an allocation exclude each other"):
        convert_folder(tmp_path, tmp_path / "out", allocation=allocation(), memory_depth=2)
    with pytest.raises(ValueError, match="the model is converted already: give an allocation"):
        convert(convert(base))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.json", "does not exist: name a JSON file"),
        ("other.json", "names 1 layers of 1 KV heads but the model"),
    ],
)
def test_errors_of_the_command_are_one_line(name, message, tmp_path, monkeypatch, capsys):
    base_model(dtype=torch.float32).save_pretrained(tmp_path / "base")
    allocation([["none"]]).save(tmp_path / "other.json")
    capsys.readouterr()  # saving shows its progress
    command = ["convert", "--model", tmp_path / "base", "--output", tmp_path / "out", "--allocation", tmp_path / name]
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, *map(str, command))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"allocation={tmp_path / name} {message}" in line
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_the_cache_grows_with_open_heads_alone():
    base, sizes = base_model(dtype=torch.float32), {}
    ids = texts(1, 200)
    for name, sources in dict(full=[["full"] * 2] * 2, one=NONE, none=[["none"] * 2] * 2).items():
        model = convert(base, allocation=allocation(sources))
        cache = DynamicCache(config=model.config)
        sizes[name] = []
        for piece in ids.split(100, dim=1):
            model(piece, past_key_values=cache)
            sizes[name].append(state_bytes(cache))
    key_and_value = 2 * base.config.head_dim * 4
    assert {name: after - before for name, (before, after) in sizes.items()} == {
        "full": 4 * 100 * key_and_value,
        "one": 100 * key_and_value,
        "none": 0,
    }
    assert sizes["none"][0] == 4 * (WINDOW + SINKS) * key_and_value


@torch.no_grad()
@pytest.mark.parametrize("sources", [NONE, MEMORY])
def test_a_state_holds_no_more_storage_than_it_counts(sources):
    """A view of all heads' keys would keep those of closed heads alive."""
    model = with_memories()
    allocate(model, allocation(sources))
    cache = DynamicCache(config=model.config)
    model(texts(1, 200), past_key_values=cache)
    storages = [tensor.untyped_storage() for layer in cache.layers for tensor in layer.tensors()]
    assert sum({s.data_ptr(): s.nbytes() for s in storages}.values()) <= 1.05 * state_bytes(cache)


class TestExport:
    """Checkpoints become folders with fixed sources."""

    def save(self, tmp_path, model, **more):
        byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
        kind = "hybridmem_config" if isinstance(model, HybridMemForCausalLM) else "transformers_config"
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({kind: model.config.to_dict(), "state_dict": weights, **more}, tmp_path / "last.ckpt")

    def export(self, tmp_path, monkeypatch, *more):
        command = ["export", "--ckpt_path", tmp_path / "last.ckpt", "--output", tmp_path / "out", *more]
        hybridmem(monkeypatch, *map(str, command))
        return AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    @torch.no_grad()
    @pytest.mark.parametrize("learned", [True, False])
    def test_of_a_learned_or_given_allocation(self, learned, tmp_path, file, monkeypatch):
        model = with_memories()
        self.save(tmp_path, model, **dict(allocation=allocation(MEMORY).to_dict()) if learned else {})
        with model.head_sources(MEMORY):
            expected = model(texts()).logits
        loaded = self.export(tmp_path, monkeypatch, *([] if learned else ["--allocation", file]))
        assert loaded(texts()).logits.equal(expected)
        assert loaded.config.head_sources == MEMORY
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
            assert {name.split(".")[2] for name in weights.keys() if ".memory." in name} == {"1"}  # noqa: SIM118
        assert Allocation.load(tmp_path / "out" / "allocation.json") == allocation(MEMORY)

    @torch.no_grad()
    def test_of_memories_that_training_left_aside(self, tmp_path, monkeypatch):
        model = with_memories()
        add_memories(model, MEMORY)
        assert model.model.layers[0].mixer.memory is not None
        self.save(tmp_path, model)
        loaded = self.export(tmp_path, monkeypatch)
        assert loaded(texts()).logits.equal(model(texts()).logits)
        assert not (tmp_path / "out" / "allocation.json").exists()
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
            assert {name.split(".")[2] for name in weights.keys() if ".memory." in name} == {"1"}  # noqa: SIM118

    @torch.no_grad()
    def test_of_a_model_of_transformers(self, tmp_path, monkeypatch):
        base = base_model(dtype=torch.float32)
        self.save(tmp_path, base, allocation=allocation().to_dict())
        loaded = self.export(tmp_path, monkeypatch)
        assert type(loaded) is HybridMemForCausalLM
        assert loaded(texts()).logits.equal(convert(base, allocation=allocation())(texts()).logits)
