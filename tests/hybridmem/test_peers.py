"""transformers' Mamba-2 and gated DeltaNet as baselines of pretraining."""

from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, Qwen3MoeConfig, Qwen3NextConfig, ViTConfig

from hybridmem.peers import build_peer, document_logits
from hybridmem.training import PretrainModule
from tests.hybridmem.training.runs import hybridmem, logged, weights, write_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

SIZES = {"vocab_size": 259, "hidden_size": 16}
SETTINGS = {
    "Mamba2Config": SIZES
    | {"num_hidden_layers": 2, "head_dim": 8, "num_heads": 4, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "Qwen3NextConfig": SIZES
    | {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "intermediate_size": 24,
        "num_experts": 0,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}
CONFIGS = {
    "Mamba2Config": Mamba2Config(**SETTINGS["Mamba2Config"]),
    "Qwen3NextConfig": Qwen3NextConfig(**SETTINGS["Qwen3NextConfig"]),
    "LlamaConfig": LlamaConfig(
        **SIZES, num_hidden_layers=1, intermediate_size=24, num_attention_heads=2, max_position_embeddings=64
    ),
}


def peer(name: str) -> dict:
    """Return the settings of a tiny baseline for `write_config`."""
    return {"model__init_args__config": {"class_path": f"transformers.{name}", "init_args": SETTINGS[name]}}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_document_in_a_packed_row_reads_nothing_else(config):
    torch.manual_seed(0)
    model = build_peer(config).eval()
    documents = torch.tensor([[5] * 9 + [3] * 2 + [5] * 1 + [-1] * 4, [7] * 16])
    ids = torch.randint(0, 259, documents.shape)
    with torch.no_grad():
        found = document_logits(model, documents, input_ids=ids)
        for row, start, stop in [(0, 0, 9), (0, 9, 11), (0, 11, 12), (1, 0, 16)]:
            alone = model(ids[row : row + 1, start:stop], use_cache=False).logits[0]
            torch.testing.assert_close(found[row, start:stop], alone, atol=1e-5, rtol=1e-5)
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(document_logits(model, documents, inputs_embeds=embeds), found)
        torch.testing.assert_close(document_logits(model, None, input_ids=ids[1:]), found[1:])


def test_passes_read_fewer_than_twice_the_tokens():
    read = []

    def model(input_ids, use_cache):
        read.append(input_ids.numel())
        return mock.Mock(logits=input_ids.unsqueeze(-1).float())

    documents = torch.randint(0, 3, (4, 256), generator=torch.Generator().manual_seed(0)).cumsum(1)
    ids = torch.arange(4 * 256).view(4, 256)
    assert torch.equal(document_logits(model, documents, input_ids=ids).squeeze(-1), ids.float())
    assert ids.numel() <= sum(read) < 2 * ids.numel()
    assert len(read) < 10


@pytest.mark.parametrize("name", SETTINGS)
def test_a_baseline_trains_resumes_tests_and_exports(name, tmp_path, monkeypatch):
    changes = peer(name) | {"model__init_args__activation_checkpointing": name == "Mamba2Config"}
    config = write_config(tmp_path, trainer__max_steps=3, **changes)
    hybridmem(monkeypatch, "fit", "--config", config)
    run = tmp_path / "run"
    whole, losses = weights(run / "step=3.ckpt"), logged(tmp_path, "train/loss")
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    (run / "step=3.ckpt").unlink()
    hybridmem(monkeypatch, "fit", "--config", config, "--ckpt_path", run / "step=2.ckpt")
    resumed = weights(run / "step=3.ckpt")
    assert all(torch.equal(resumed[key], weight) for key, weight in whole.items())
    needles = ["--data.init_args.needle_lengths", "[100]", "--data.init_args.num_needles", "2"]
    hybridmem(monkeypatch, "test", "--config", config, "--ckpt_path", run / "step=3.ckpt", *needles)
    assert logged(tmp_path, "test/bits_per_byte")[0] > 0
    assert 0 <= logged(tmp_path, "test/needle_accuracy/100")[0] <= 1
    hybridmem(monkeypatch, "export", "--ckpt_path", run / "step=3.ckpt", "--output", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(model.config).__name__ == name
    assert model.config.eos_token_id == 258
    assert torch.equal(model.lm_head.weight, whole["model.lm_head.weight"])
    assert f"| model_type | {model.config.model_type} |" in (tmp_path / "exported" / "README.md").read_text()
    hybridmem(monkeypatch, "generate", "--model", tmp_path / "exported", "--max_new_tokens", 3)


MONITOR = [{"class_path": "hybridmem.training.MemoryMonitor"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__callbacks": MONITOR}, "remove MemoryMonitor from trainer.callbacks"),
        (peer("Mamba2Config") | {"model__init_args__config__init_args__vocab_size": 200}, "vocab_size to 259"),
        (
            {"model__init_args__config__init_args__bad": 1},
            "hybridmem: error: model.config: Option 'bad' is not accepted",
        ),
        (
            {"model__init_args__config__init_args__num_heads": 5},
            "hybridmem: error: Inconsistent configuration: hidden_size * expand (32) must equal",
        ),
    ],
)
def test_impossible_settings_stop_before_training_with_one_line(tmp_path, monkeypatch, capsys, changes, message):
    changes = peer("Mamba2Config") | changes
    settings = SETTINGS["Mamba2Config"].copy()
    changes["model__init_args__config"] = {"class_path": "transformers.Mamba2Config", "init_args": settings}
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, **changes))
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_wrong_type_in_a_hybridmem_configuration_names_one_setting(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, model__init_args__config__hidden_size="a")
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == "hybridmem: error: model.config.hidden_size: Expected a int. Got value: a"


def test_unsupported_settings_name_the_remedy():
    with pytest.raises(ValueError, match="set carry_state to false"):
        PretrainModule(CONFIGS["Mamba2Config"], carry_state=True)
    with pytest.raises(ValueError, match=r"no causal LM for ViTConfig; set config\.class_path"):
        PretrainModule(ViTConfig())
    with pytest.raises(ValueError, match="output_router_logits=true asks for the router's loss"):
        PretrainModule(Qwen3MoeConfig(output_router_logits=True))
    with (
        mock.patch.object(PretrainModule, "device_mesh", mock.Mock()),
        pytest.raises(ValueError, match=r"set trainer\.strategy to ddp"),
    ):
        PretrainModule(CONFIGS["Mamba2Config"]).configure_model()


def test_a_checkpoint_of_another_kind_of_model_is_refused(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, trainer__max_steps=3)
    hybridmem(monkeypatch, "fit", "--config", config)
    capsys.readouterr()
    config = write_config(tmp_path, trainer__max_steps=3, **peer("Mamba2Config"))
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config, "--ckpt_path", tmp_path / "run" / "step=2.ckpt")
    assert "the checkpoint belongs to another model: " in capsys.readouterr().err
