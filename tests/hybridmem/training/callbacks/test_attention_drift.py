"""Attention drift is 0 before training and grows during it; measuring leaves no trace."""

import pytest
import torch

from hybridmem.training import AttentionDrift
from tests.hybridmem.training.policy.test_module import write_config
from tests.hybridmem.training.runs import hybridmem, logged, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
DRIFT = {
    "class_path": "hybridmem.training.AttentionDrift",
    "init_args": {"num_prompts": 3, "layers": [0, -1], "window": 3},
}
CHECKPOINTS = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 2},
}


def drift(folder, name, layer=1):
    return logged(folder, f"val/attention/layer_{layer}/{name}")


@pytest.mark.parametrize("model", ["ours", "llama"])
def test_it_measures_how_far_attention_has_moved(model, tmp_path, monkeypatch):
    config = write_config(tmp_path, model, trainer__callbacks=[DRIFT, CHECKPOINTS])
    hybridmem(monkeypatch, "fit", "--config", config)
    for layer in (0, 1):
        moved, span = (drift(tmp_path, name, layer) for name in ("divergence_from_start", "effective_span"))
        assert moved
        assert all(0 < value < 0.7 for value in moved)
        assert span
        assert all(1 <= value <= 5 for value in span)
        distance, beyond = (drift(tmp_path, name, layer) for name in ("mean_distance", "beyond_window"))
        assert all(1 <= value <= 5 for value in distance)
        assert all(0 <= value < 1 for value in beyond)
        assert len(distance) == len(beyond) == len(span)
    for kind in ("persistent", "memory", "window"):
        assert bool(drift(tmp_path, f"allocation/{kind}")) == (model == "ours")
    hybridmem(
        monkeypatch, "fit", "--config", write_config(tmp_path, model), "--trainer.default_root_dir", tmp_path / "b"
    )
    watched, alone = weights(tmp_path / "run" / "step=6.ckpt"), weights(tmp_path / "b" / "step=6.ckpt")
    assert all(torch.equal(watched[name], alone[name]) for name in watched)


def test_an_unchanged_policy_has_no_drift(tmp_path, monkeypatch):
    still = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0}}
    config = write_config(tmp_path, trainer__callbacks=[DRIFT], model__init_args__optimizer=still)
    hybridmem(monkeypatch, "fit", "--config", config)
    assert drift(tmp_path, "divergence_from_start") == [0.0]


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="num_prompts must be at least 1"):
        AttentionDrift(num_prompts=0)
    with pytest.raises(ValueError, match="window=4 needs a target over tokens, not allocation"):
        AttentionDrift(target="allocation", window=4)
