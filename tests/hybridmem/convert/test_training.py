"""Training of converted models with token and attention objectives, distillation from the base, and export."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridmem.convert import convert_folder
from hybridmem.data import byte_tokenizer
from tests.hybridmem.convert.bases import base_model
from tests.hybridmem.training.policy.test_module import distilling, write_config
from tests.hybridmem.training.runs import hybridmem, logged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def folders(tmp_path):
    """Write a base model and its conversion, whose last layer has full attention."""
    special = dict(pad_token_id=256, bos_token_id=257, eos_token_id=258)
    base_model("qwen3", "yarn", torch.float32, vocab_size=259, **special).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    sources = [["memory", "none"], ["full", "full"]]
    convert_folder(
        tmp_path / "base", tmp_path / "converted", attention_window=3, num_sink_tokens=1, head_source=sources
    )
    return tmp_path / "base", tmp_path / "converted"


def test_rewards_on_tokens_and_attention(folders, tmp_path, monkeypatch):
    config = write_config(tmp_path, model__init_args__model=str(folders[1]))
    hybridmem(monkeypatch, "fit", "--config", config)
    for name in ("reward", "loss", "grad_norm", "attention/divergence", "val/accuracy"):
        assert logged(tmp_path, name), name
    assert max(logged(tmp_path, "sampling/sampling_logp_difference/max")) < 1e-4
    checkpoint = max((tmp_path / "run").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    hybridmem(monkeypatch, "export", "--ckpt_path", checkpoint, "--output", tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert model.config.head_sources == [["memory", "none"], ["full", "full"]]


def test_the_base_model_teaches(folders, tmp_path, monkeypatch):
    base, converted = folders
    changes = dict(model__init_args__model=str(converted), model__init_args__objectives=[distilling(base)])
    config = write_config(tmp_path, **changes, model__init_args__num_iterations=1)
    hybridmem(monkeypatch, "fit", "--config", config)
    assert all(torch.isfinite(torch.tensor(logged(tmp_path, "loss"))))
