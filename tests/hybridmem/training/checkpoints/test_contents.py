"""What an exported folder says of where it was made: nothing."""

import getpass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridmem import HybridMemForCausalLM
from hybridmem.training import PretrainModule
from hybridmem.training.checkpoints.contents import export, load_policy
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
    loaded = load_policy(str(tmp_path / "start"))  # remembers where it came from
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
        (dict(intermediate_size=20), r"init_from: .* is another model: model.layers.0.*there and .* here"),
        (dict(num_hidden_layers=1), r"init_from: .* is another model: model.layers.1.* is .* there and absent here"),
    ],
)
def test_weights_of_another_shape_are_refused_by_name(tmp_path, changes, message):
    HybridMemForCausalLM(tiny_config()).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=message):
        PretrainModule(tiny_config(**changes), init_from=str(tmp_path / "start")).configure_model()


def test_weights_that_are_not_there_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"init_from: .*nowhere"):
        PretrainModule(tiny_config(), init_from=str(tmp_path / "nowhere")).configure_model()
