"""The collapse guard: its measurements, its actions, and exact resumption after it stopped a run."""

import math
import re
from pathlib import Path

import pytest
import torch

from hybridmem.rl.rollouts.sampling import Sampling
from hybridmem.training import CollapseGuard
from tests.hybridmem.training.policy.test_module import ATTENTION, TOKENS, write_config
from tests.hybridmem.training.runs import hybridmem, logged, weights

from .test_policy_probe import policy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
CHECKPOINTS = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 2},
}
BONUS = {**ATTENTION, "init_args": {"entropy_bonus": 0.01}}


def guarded(folder, guard=None, model="ours", objective=ATTENTION, **changes):
    """Run training with checkpoints and, unless `guard` is None, guard measurements every 2 steps."""
    settings = {"every_n_steps": 2, "num_prompts": 2, **(guard or {})}
    callbacks = [{"class_path": "hybridmem.training.CollapseGuard", "init_args": settings}, CHECKPOINTS]
    changes["trainer__callbacks"] = callbacks[guard is None :]
    return write_config(folder, model, model__init_args__objectives=[TOKENS, objective], **changes)


def scripted(monkeypatch, spans):
    """Replace measurements by these spans, one every 2 steps."""

    def measure(_, module):
        return {"effective_span": float(spans[module.trainer.global_step // 2])}

    monkeypatch.setattr(CollapseGuard, "measure", measure)


def test_a_watched_run_logs_and_is_the_run_it_would_have_been(tmp_path, monkeypatch):
    hybridmem(monkeypatch, "fit", "--config", guarded(tmp_path, {}))
    for name, most in (("effective_span", 6), ("allocation_entropy", math.log(3)), ("diversity", math.log(2))):
        values = logged(tmp_path, f"collapse/{name}")
        assert len(values) == 3, name
        assert all(0 < value <= most for value in values), name
    hybridmem(monkeypatch, "fit", "--config", guarded(tmp_path, trainer__default_root_dir=str(tmp_path / "alone")))
    watched, alone = weights(tmp_path / "run" / "step=6.ckpt"), weights(tmp_path / "alone" / "step=6.ckpt")
    assert all(torch.equal(watched[name], alone[name]) for name in watched)


def test_attention_without_queries_and_gates_without_weights_are_even():
    module = policy()
    module.sampling = Sampling(max_completion_length=5)
    attention = module.model.model.layers[1].mixer.attention
    gate = module.model.model.layers[1].mixer.allocation_gate
    with torch.no_grad():
        attention.qkv_proj.weight.zero_()
        gate.weight.zero_()
        gate.bias.zero_()
    values = CollapseGuard(num_prompts=1).measure(module)
    assert values["allocation_entropy"] == pytest.approx(math.log(2))
    assert values["diversity"] == pytest.approx(0, abs=1e-6)  # all responses attend alike, whatever their text
    assert values["distinct_patterns"] == 1
    # With prompts of 4 tokens and a window of 7, the response's tokens see 4, 5, 6, 6, 6 earlier tokens.
    assert values["effective_span"] == pytest.approx((4 + 5 + 6 + 6 + 6) / 5, rel=1e-5)


def test_a_low_threshold_tells_patterns_apart():
    module = policy()
    module.sampling = Sampling(max_completion_length=5)
    same, finest = (CollapseGuard(num_prompts=1, pattern_threshold=at).measure(module) for at in (0.69, 0.0))
    assert same["distinct_patterns"] == 1 < finest["distinct_patterns"] <= module.num_generations
    assert same["diversity"] == finest["diversity"] > 0


@pytest.mark.parametrize("variant", ["swa", "mac"])
def test_responses_that_are_alike_have_no_diversity(variant):
    module = policy(variant)
    module.sampling = Sampling(max_completion_length=5)
    varied = CollapseGuard(num_prompts=2).measure(module)
    module.sampling = Sampling(max_completion_length=5, temperature=0.0)
    alike = CollapseGuard(num_prompts=2).measure(module)
    assert varied["diversity"] > 0.001
    assert alike["diversity"] == pytest.approx(0, abs=1e-6)
    assert ("allocation_entropy" in varied) == (variant == "mac")


def test_a_warning_for_each_crossing(tmp_path, monkeypatch):
    scripted(monkeypatch, [3, 1, 1, 1, 3, 1, 3, 1.5, 1.5])
    config = guarded(tmp_path, dict(min_effective_span=2, patience=2), "llama", trainer__max_steps=16)
    with pytest.warns(UserWarning, match="collapse at step") as caught:
        hybridmem(monkeypatch, "fit", "--config", config)
    messages = [str(warning.message) for warning in caught if "collapse at step" in str(warning.message)]
    assert [int(re.findall(r"step (\d+)", message)[0]) for message in messages] == [4, 16]
    assert messages[1].startswith("collapse at step 16, effective_span 1.5 below 2.0 for 2 probes or more")


def test_the_bonus_rises_to_its_maximum_and_a_resumed_run_keeps_it(tmp_path, monkeypatch):
    scripted(monkeypatch, [3, 1, 1, 1, 1, 1, 1])
    guard = dict(action="raise_bonus", min_effective_span=2, patience=1, bonus_factor=3, max_bonus=0.2)
    config = guarded(tmp_path, guard, "llama", objective=BONUS, trainer__max_steps=10)
    with pytest.warns(UserWarning, match=r"already at max_bonus=0\.2"):
        hybridmem(monkeypatch, "fit", "--config", config)
    assert logged(tmp_path, "collapse/entropy_bonus") == pytest.approx([0.03, 0.09, 0.2, 0.2, 0.2])
    resumed = ("--ckpt_path", tmp_path / "run" / "step=4.ckpt", "--trainer.default_root_dir", tmp_path / "again")
    with pytest.warns(
        UserWarning, match=r"raised entropy_bonus to 0\.2"
    ):  # at step 6, because the start is not measured
        hybridmem(monkeypatch, "fit", "--config", config, *resumed)
    whole, again = weights(tmp_path / "run" / "step=10.ckpt"), weights(tmp_path / "again" / "step=10.ckpt")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    unraised = guarded(tmp_path, None, "llama", objective=BONUS, trainer__max_steps=10)
    hybridmem(monkeypatch, "fit", "--config", unraised, "--trainer.default_root_dir", tmp_path / "unraised")
    other = weights(tmp_path / "unraised" / "step=10.ckpt")
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_a_stop_keeps_the_checkpoint_from_before(tmp_path, monkeypatch):
    scripted(monkeypatch, [3, 3, 1, 3, 1, 1, 3])
    guard = dict(action="stop", min_effective_span=2, patience=2)
    config = guarded(tmp_path, guard, trainer__max_steps=12)
    kept = tmp_path / "run" / "last_good.ckpt"
    with pytest.warns(UserWarning, match=f"collapse at step 10, .*{re.escape(str(kept))}, from step 6"):
        hybridmem(monkeypatch, "fit", "--config", config)
    assert torch.load(kept, weights_only=True)["global_step"] == 6
    assert not (tmp_path / "run" / "step=12.ckpt").exists()
    # The resumed run equals an uninterrupted one; a later collapse still names the original checkpoint.
    again = ("--ckpt_path", kept, "--trainer.default_root_dir", tmp_path / "again")
    with pytest.warns(UserWarning, match=f"{re.escape(str(kept))}, from step 6"):
        hybridmem(monkeypatch, "fit", "--config", config, *again)
    first, second = weights(tmp_path / "run" / "step=10.ckpt"), weights(tmp_path / "again" / "step=10.ckpt")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.load(kept, weights_only=True)["global_step"] == 6
    assert not list(Path(tmp_path / "again").glob("last_good*"))


@pytest.mark.parametrize(
    ("guard", "model", "message"),
    [
        (dict(action="stop", min_effective_span=99), "ours", "min_effective_span=99.0 is above the initial policy's"),
        (dict(min_allocation_entropy=0.1), "swa", "needs a layer of variant mag or mac, and layers=[-1] has none"),
        (dict(action="raise_bonus", min_diversity=0.1), "ours", "an entropy_bonus above 0"),
        (dict(), "lmm", "has no attention; choose target='memory'"),
    ],
)
def test_unsuitable_policies_stop_before_training(tmp_path, monkeypatch, capsys, guard, model, message):
    objective = {**ATTENTION, "init_args": {"target": "memory"}} if model == "lmm" else ATTENTION
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", guarded(tmp_path, guard, model, objective))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target="allocation"), "choose one of attention, memory, unified"),
        (dict(patience=0), "patience=0"),
        (dict(min_effective_span=1.0), "min_effective_span=1.0 must be between 1 and inf"),
        (dict(min_diversity=0.7), "min_diversity=0.7 must be between 0 and 0.6931"),
        (dict(action="stop"), "action='stop' needs a threshold"),
        (dict(bonus_factor=1.0), "bonus_factor=1.0 must be above 1"),
        (dict(pattern_threshold=0.7), "pattern_threshold=0.7 must be at least 0 and below ln 2"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CollapseGuard(**settings)
