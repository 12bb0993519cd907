"""Conversion between folders: transferred settings, memory use, and errors before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hybridmem import HybridMemForCausalLM
from hybridmem.convert import conversion, convert, convert_folder
from hybridmem.convert import weights as conversion_weights
from hybridmem.convert.weights import Weight, plan_shards
from hybridmem.data import byte_tokenizer
from tests.hybridmem.convert.bases import VOCABULARY, base_config, base_model, texts
from tests.hybridmem.training.runs import hybridmem


@pytest.fixture
def folder(tmp_path):
    """Write a base model with all files that folders can contain."""
    path = tmp_path / "base"
    base = base_model("llama tied", dtype=torch.bfloat16, vocab_size=259)
    base.generation_config = GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=2)
    base.save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    (path / "LICENSE").write_text("Apache-2.0")
    (path / "training_args.bin").write_text("not carried")
    return path


def shard(folder: Path, parts: str = "4KB") -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=parts)


@torch.no_grad()
@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_becomes_a_folder(folder, tmp_path, sharded):
    if sharded:
        shard(folder)
    output = tmp_path / "new" / "converted"
    convert_folder(folder, output, attention_window=8, shard_bytes=4000 if sharded else 2**30)
    files = {path.name for path in output.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "LICENSE", "README.md"} <= files
    assert {"config.json", "configuration.py", "modeling.py", "heads.py"} <= files
    assert "training_args.bin" not in files
    assert len(list(output.glob("*.safetensors"))) > 1 if sharded else (output / "model.safetensors").is_file()
    assert list(tmp_path.glob("new/.*")) == []
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model) is HybridMemForCausalLM
    assert (model.dtype, model.generation_config.temperature) == (torch.bfloat16, 0.7)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.equal(base.lm_head.weight)
    ids = texts()
    torch.testing.assert_close(model.float()(ids).logits, base.float()(ids).logits, rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.apply_chat_template([dict(role="user", content="hi")], tokenize=False) == "hi"


@torch.no_grad()
def test_in_memory_and_on_disk_are_the_same_model(folder, tmp_path):
    settings = dict(attention_window=8, num_sink_tokens=1, head_source="memory", memory_depth=2)
    convert_folder(folder, tmp_path / "converted", **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    for model in (convert(folder, **settings), convert(AutoModelForCausalLM.from_pretrained(folder), **settings)):
        assert model.config.to_diff_dict().keys() == loaded.config.to_diff_dict().keys() - {"auto_map", "architectures"}
        for name, tensor in loaded.state_dict().items():
            assert model.state_dict()[name].equal(tensor), name
    assert convert(folder).generation_config.temperature == 0.7


@torch.no_grad()
def test_heads_are_chosen_one_by_one():
    sources = [["full", "none"], ["memory", "full"]]
    model = convert(base_model(), attention_window=8, head_source=sources)
    assert model.config.head_sources == sources
    assert model.model.layers[0].mixer.memory is None
    assert model(texts()).logits.isfinite().all()


def test_a_model_keeps_its_own_weights():
    base = base_model()
    before = base.lm_head.weight.clone()
    convert(base).lm_head.weight.data.zero_()
    assert base.lm_head.weight.equal(before)


def test_shards_hold_at_most_their_bytes():
    weights = {str(n): Weight((size,), size, lambda: torch.zeros(1)) for n, size in enumerate([3, 3, 9, 2, 2, 1])}
    assert plan_shards(weights, 5) == [["0"], ["1"], ["2"], ["3", "4", "5"]]


def test_one_shard_is_in_memory_at_a_time(folder, tmp_path, monkeypatch):
    shard(folder)
    held, most, save = [], [], conversion_weights.save_file

    def counting(tensors, *arguments, **options):
        most.append(sum(t.numel() * t.element_size() for t in tensors.values()))
        held.append(len(tensors))
        save(tensors, *arguments, **options)

    monkeypatch.setattr(conversion_weights, "save_file", counting)
    convert_folder(folder, tmp_path / "converted", shard_bytes=20_000)
    assert len(held) > 2
    assert max(most) <= 20_000


UNSUPPORTED = {
    "model_type='gpt2'": dict(model_type="gpt2"),
    "final_logit_softcapping=30.0": dict(final_logit_softcapping=30.0),
    "num_local_experts=8": dict(num_local_experts=8),
    "rope_type='dynamic'": dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    "partial_rotary_factor=0.5": dict(
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
    ),
    "hidden_act='gelu'": dict(hidden_act="gelu"),
    "quantization_config=": dict(quantization_config=dict(quant_method="gptq", bits=4)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_features_are_refused_by_name(message, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | UNSUPPORTED[message]))
    with pytest.raises(ValueError, match=message):
        convert_folder(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


BAD = {
    "attention_window=300 is longer than the model's context of 256 tokens: use at most 256": [
        "--attention_window=300"
    ],
    "attention_window=0 must be at least 1": ["--attention_window=0"],
    "num_sink_tokens=-1 must lie between 0 and the model's context of 256 tokens": ["--num_sink_tokens=-1"],
    "head_source='most' is unknown: choose one of full, memory, none": ["--head_source=most"],
    "head_sources names 1 layers but num_hidden_layers=2": ['--head_source=[["full","full","full","full"]]'],
    "head_sources[1] names 1 sources but num_key_value_heads=4": [
        '--head_source=[["full","none","none","none"],["full"]]'
    ],
    "memory_depth=0 must be at least 1": ["--memory_depth=0"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_are_one_line(message, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "converted"
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "convert", "--model", str(folder), "--output", str(output), *BAD[message])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not output.exists()


def test_windows_fit_into_sliding_windows():
    with pytest.raises(ValueError, match="attention_window=10 is longer than the model's sliding window of 9 tokens"):
        convert(base_model("mistral sliding"), attention_window=10)


def test_broken_folders_are_named(folder, tmp_path, monkeypatch):
    output = tmp_path / "converted"
    output.mkdir()
    (output / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_folder(folder, output)
    with pytest.raises(FileExistsError, match="is a file"):
        convert_folder(folder, output / "notes")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        convert_folder(output, tmp_path / "other")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        convert_folder("no/such-model", tmp_path / "other")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: type("", (), dict(free=10)))
    with pytest.raises(OSError, match=r"GB of disk, but 0\.0 GB are free"):
        convert_folder(folder, tmp_path / "other")
    monkeypatch.setattr(conversion, "available_memory", lambda: 10)
    with pytest.raises(MemoryError, match="GB of memory are needed"):
        convert_folder(folder, tmp_path / "other")
    shard(folder)
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002"):
        convert_folder(folder, tmp_path / "other")
    next(folder.glob("model-00001*")).write_bytes(b"broken")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "' + next(folder.glob("model-00001*")).name + '"}}'
    )
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        convert_folder(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_shapes_that_contradict_the_configuration_are_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(intermediate_size=40)))
    with pytest.raises(
        ValueError, match=r"gate_proj\.weight has shape \[48, 32\] instead of the configuration's \[40, 32\]"
    ):
        convert_folder(folder, tmp_path / "converted")
    (folder / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=3)))
    with pytest.raises(ValueError, match=r"the model lacks model\.layers\.2"):
        convert_folder(folder, tmp_path / "converted")
    (folder / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=1)))
    with pytest.raises(ValueError, match="that is unknown in its family"):
        convert_folder(folder, tmp_path / "converted")


def test_an_interrupted_conversion_leaves_nothing(folder, tmp_path):
    def stop(shards):
        yield shards[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_folder(folder, tmp_path / "converted", shard_bytes=4000, track=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@torch.no_grad()
def test_the_command_writes_a_folder(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "converted"
    hybridmem(monkeypatch, "convert", "--model", str(folder), "--output", str(output), "--attention_window", "8")
    assert f"wrote {output}" in capsys.readouterr().out
    with safe_open(output / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}


@pytest.mark.slow
def test_a_converted_folder_runs_from_its_own_code(folder, tmp_path):
    """A process that imports only transformers loads the folder with trust_remote_code."""
    convert_folder(folder, tmp_path / "converted", attention_window=8, head_source="memory")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path / 'converted')!r}, trust_remote_code=True);"
        "assert 'hybridmem' not in sys.modules;"
        "print(m.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert "torch.Size([1, 23])" in done.stdout, done.stderr


def test_base_configurations_are_left_alone():
    base = base_config("qwen3", "yarn")
    before = json.dumps(base.to_dict(), default=str)
    conversion.converted_config(base, attention_window=8)
    assert json.dumps(base.to_dict(), default=str) == before
    assert base.vocab_size == VOCABULARY
