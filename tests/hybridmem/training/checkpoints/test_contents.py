"""Exported folders reveal nothing about the machine that wrote them."""

import getpass
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hybridmem import HybridMemForCausalLM
from hybridmem.cli.consolidate import consolidate
from hybridmem.cli.export import export
from hybridmem.cli.generate import generate
from hybridmem.cli.subnetwork import subnetwork
from hybridmem.training import PretrainModule
from hybridmem.training.checkpoints import contents
from hybridmem.training.checkpoints.contents import load_policy
from hybridmem.training.checkpoints.loading import load_checkpoint
from tests.hybridmem.data.helpers import byte_level_bpe
from tests.hybridmem.models import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_no_path_and_no_user_name(tmp_path, kind):
    byte_level_bpe().save_pretrained(tmp_path / "start")
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = (
        HybridMemForCausalLM(tiny_config())
        if kind == "ours"
        else LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape, num_key_value_heads=2))
    )
    model.save_pretrained(tmp_path / "start")
    loaded = load_policy(str(tmp_path / "start"))  # stores the folder it was loaded from
    checkpoint = {
        "hybridmem_config" if kind == "ours" else "transformers_config": loaded.config.to_dict(),
        "state_dict": {f"model.{name}": weight for name, weight in loaded.state_dict().items()},
        "tokenizer": str(tmp_path / "start"),
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    export(tmp_path / "last.ckpt", tmp_path / "out")
    secrets = [str(tmp_path).encode(), str(Path.home()).encode(), f"/{getpass.getuser()}/".encode()]
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
    for file in files:
        assert not [secret for secret in secrets if secret in file.read_bytes()], file.name


def test_training_starts_from_another_models_weights_with_another_window(tmp_path):
    model = HybridMemForCausalLM(tiny_config())
    model.save_pretrained(tmp_path / "start")
    window = model.config.attention_window + 5
    module = PretrainModule(tiny_config(attention_window=window), init_from=str(tmp_path / "start"))
    module.configure_model()
    assert module.model.config.attention_window == window
    for name, weight in model.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(intermediate_size=20), r"init_from: .* is another model: model.layers.0.* differs \(.* there, .* here\)"),
        (
            dict(num_hidden_layers=1),
            r"init_from: .* is another model: model.layers.1.* differs \(.* there, absent here\)",
        ),
    ],
)
def test_weights_of_another_shape_are_refused_by_name(tmp_path, changes, message):
    HybridMemForCausalLM(tiny_config()).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=message):
        PretrainModule(tiny_config(**changes), init_from=str(tmp_path / "start")).configure_model()


@pytest.fixture
def adapter(tmp_path):
    """Write a folder with a PEFT adapter and a tokenizer, but no model."""
    shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=330)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
    model.save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    byte_level_bpe().save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("use", "setting"),
    [
        (lambda folder: load_policy(str(folder)), ""),
        (lambda folder: PretrainModule(tiny_config(), init_from=str(folder)).configure_model(), "init_from: "),
        (lambda folder: generate(folder), ""),
        (lambda folder: subnetwork(folder, folder), ""),
        (lambda folder: export(folder, folder / "out"), ""),
        (lambda folder: consolidate(folder, folder / "out.ckpt"), ""),
        (lambda folder: load_checkpoint(folder), ""),
    ],
    ids=["load_policy", "init_from", "generate", "subnetwork", "export", "consolidate", "load_checkpoint"],
)
def test_an_adapter_without_its_model_is_refused_with_a_remedy(adapter, use, setting):
    base = adapter.parent / "base"
    message = f"^{setting}'{adapter}' is a PEFT adapter of '{base}', not a model: merge it .* give FOLDER, or give"
    with pytest.raises(ValueError, match=message):
        use(adapter)


def test_the_remedy_for_an_adapter_works(adapter, tmp_path):
    merged = AutoPeftModelForCausalLM.from_pretrained(str(adapter)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert isinstance(load_policy(str(tmp_path / "merged")), LlamaForCausalLM)


def test_an_adapter_without_its_base_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{broken")
    with pytest.raises(ValueError, match="is a PEFT adapter, not a model"):
        load_policy(str(tmp_path))


def test_an_adapter_of_the_hub_is_called_by_its_name(adapter, monkeypatch):
    monkeypatch.setattr(contents, "find_adapter_config_file", lambda name: str(adapter / "adapter_config.json"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="'someone/adapter' is a PEFT adapter of"):
        load_policy("someone/adapter")


def test_missing_and_unsuitable_folders_are_distinguished(tmp_path):
    with pytest.raises(ValueError, match=rf"ckpt_path={tmp_path} is not a checkpoint folder; give a \.ckpt file"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export(tmp_path / "absent", tmp_path / "out")


def test_weights_that_are_not_there_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"init_from: .*nowhere"):
        PretrainModule(tiny_config(), init_from=str(tmp_path / "nowhere")).configure_model()
