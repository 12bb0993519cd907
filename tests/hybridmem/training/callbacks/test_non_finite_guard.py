"""The guard against NaN and inf, in pretraining and in reinforcement learning."""

import lightning as L
import pytest
import torch

from hybridmem.training import NonFiniteGuard
from tests.hybridmem.training.policy import test_module as test_policy
from tests.hybridmem.training.runs import hybridmem, logged, weights, write_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
CHECKPOINTS = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 1},
}


class Spoil(L.Callback):
    """Callback that makes a gradient or a layer's output NaN in one optimiser step."""

    def __init__(self, step: int, output: str | None = None, gradient: str | None = None):
        self.step, self.output, self.gradient = step, output, gradient

    def on_fit_start(self, trainer, pl_module):
        if self.output is not None:
            module = pl_module.model.get_submodule(self.output)
            module.register_forward_hook(lambda _, __, out: out * self.factor(trainer, float("nan")))
        if self.gradient is not None:
            parameter = pl_module.model.get_parameter(self.gradient)
            parameter.register_hook(lambda grad: grad * self.factor(trainer, float("inf")))

    def factor(self, trainer, bad):
        return bad if trainer.global_step == self.step and trainer.training else 1.0


def spoilt(**settings):
    return {"class_path": f"{__name__}.Spoil", "init_args": {"step": 3, **settings}}


def guard(**settings):
    return {"class_path": "hybridmem.training.NonFiniteGuard", "init_args": settings}


@pytest.mark.parametrize("kind", ["pretraining", "reinforcement learning"])
def test_it_stops_before_the_weights_change_and_names_layer_and_step(tmp_path, monkeypatch, capsys, kind):
    write = write_config if kind == "pretraining" else test_policy.write_config
    callbacks = [spoilt(output="model.layers.1.feed_forward"), CHECKPOINTS]
    config = write(tmp_path, trainer__callbacks=callbacks)
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", config)
    assert stopped.value.code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hybridmem: stopped: the loss is nan (first in the output of model.layers.1) at optimiser")
    assert "optimiser step 3" in error
    assert "set NonFiniteGuard's action to skip" in error
    last = max((tmp_path / "run").glob("step=*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    assert f"--ckpt_path {last}" in error
    assert all(torch.isfinite(weight).all() for weight in weights(last).values())


def test_a_skipped_step_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    callbacks = [guard(action="skip"), spoilt(gradient="model.layers.0.feed_forward.down_proj.weight"), CHECKPOINTS]
    config = write_config(tmp_path, trainer__callbacks=callbacks, trainer__accumulate_grad_batches=2)
    skipped = r"gradient of model\.model\.layers\.0\.feed_forward\.down_proj\.weight .* step 3; skipped the"
    with pytest.warns(UserWarning, match=skipped):
        hybridmem(monkeypatch, "fit", "--config", config)
    before, after, end = (weights(tmp_path / "run" / f"step={step}.ckpt") for step in (3, 4, 6))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["model.lm_head.weight"], end["model.lm_head.weight"])
    assert all(torch.isfinite(weight).all() for weight in end.values())
    assert set(logged(tmp_path, "nonfinite/skipped")) == {1.0}


def test_patience_has_an_end(tmp_path, monkeypatch, capsys):
    spoiling = [spoilt(step=step, output="model.layers.0") for step in (2, 3, 4)]
    config = write_config(tmp_path, trainer__callbacks=[guard(action="skip", patience=2), *spoiling, CHECKPOINTS])
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config)
    assert "optimiser step 4, after 2 skipped steps" in capsys.readouterr().err


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match="patience must be at least 1, not 0"):
        NonFiniteGuard(patience=0)
