"""Routers of tokens from the command line: the model stays frozen, runs resume exactly, decisions are drawn."""

import pytest
import torch

from hybridmem import HybridMemForCausalLM
from hybridmem.convert import Allocation
from hybridmem.training.checkpoints.contents import load_policy
from hybridmem.training.checkpoints.loading import load_checkpoint
from tests.hybridmem.training.runs import hybridmem, logged

from .test_allocation import CURVE, allocation, config_of
from .test_module import ATTENTION, TOKENS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SAVED = [
    {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "{step}", "save_top_k": -1, "every_n_train_steps": 2},
    }
]
DRAWN = {"class_path": "hybridmem.training.RoutedTokens"}


def router(kind="converted", **settings):
    """Return an objective that routes tokens."""
    return allocation(unit="token", attention_window=None if kind == "mag" else 2, **settings)


def learned(folder, step, run="run"):
    """Return the parameters and counters of a run's router."""
    weights = load_checkpoint(str(folder / run / f"step={step}.ckpt"))["state_dict"]
    return {name: value for name, value in weights.items() if name.startswith("learned.Allocation.")}


@pytest.mark.parametrize(("kind", "prefill"), [("converted", "full"), ("llama", "allocated"), ("mag", "allocated")])
def test_a_frozen_model_learns_a_router(tmp_path, monkeypatch, kind, prefill):
    config = config_of(tmp_path, kind, [router(kind, prefill=prefill)], trainer__callbacks=[*SAVED, DRAWN])
    hybridmem(monkeypatch, "fit", "--config", config)
    weights = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]
    start = load_policy(str(tmp_path / "policy")).state_dict()
    assert all(torch.equal(weights[f"model.{name}"], tensor) for name, tensor in start.items())
    found = learned(tmp_path, 6)
    assert found["learned.Allocation.weight"].abs().max() > 0.01
    assert found["learned.Allocation.num_rollouts"] == 6
    costs = logged(tmp_path, "allocation/cost")
    assert min(costs) >= 0
    assert 0 < sum(costs) / 6 < 1
    assert all(0 <= share <= 1 for share in logged(tmp_path, "val/beyond"))
    assert {path.name for path in (tmp_path / "run" / "routed_tokens").iterdir()} == {"step_3.png", "step_6.png"}
    assert not logged(tmp_path, "entropy")  # no pass over the responses
    assert "allocation" not in load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))


def test_responses_of_one_token_log_no_decisions(tmp_path, monkeypatch):
    config = config_of(tmp_path, objectives=[router(prefill="full")], trainer__max_steps=2)
    hybridmem(monkeypatch, "fit", "--config", config, "--model.init_args.max_completion_length", "1")
    assert len(logged(tmp_path, "allocation/price")) == 2
    for name in ("closed", "decided", "cost"):
        assert not logged(tmp_path, f"allocation/{name}")


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    config = config_of(tmp_path, "mag", [router("mag", budget=0.5, prefill="allocated")], trainer__max_steps=4)
    hybridmem(monkeypatch, "fit", "--config", config)
    again = ("--trainer.default_root_dir", str(tmp_path / "again"))
    hybridmem(monkeypatch, "fit", "--config", config, *again, "--ckpt_path", str(tmp_path / "run" / "step=2.ckpt"))
    whole, resumed = learned(tmp_path, 4), learned(tmp_path, 4, "again")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_frozen_model_learns_which_tokens_to_store_and_resumes_exactly(tmp_path, monkeypatch):
    writes = allocation(unit="write", attention_window=None, prefill="allocated", budget=0.5)
    config = config_of(tmp_path, "mag", [writes], trainer__max_steps=4, trainer__callbacks=[*SAVED, DRAWN])
    hybridmem(monkeypatch, "fit", "--config", config)
    again = ("--trainer.default_root_dir", str(tmp_path / "again"))
    hybridmem(monkeypatch, "fit", "--config", config, *again, "--ckpt_path", str(tmp_path / "run" / "step=2.ckpt"))
    whole, resumed = learned(tmp_path, 4), learned(tmp_path, 4, "again")
    assert whole["learned.Allocation.weight"].abs().max() > 0.01
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert 0 < sum(logged(tmp_path, "allocation/cost")) / 4 < 1
    shares = logged(tmp_path, "val/written")
    assert shares
    assert all(0 <= share <= 1 for share in shares)
    assert (tmp_path / "run" / "routed_tokens").exists()
    exported = tmp_path / "exported"
    hybridmem(monkeypatch, "export", "--ckpt_path", str(tmp_path / "run" / "step=4.ckpt"), "--output", str(exported))
    model = HybridMemForCausalLM.from_pretrained(exported)
    for number, layer in enumerate(model.model.layers):
        assert torch.equal(layer.mixer.memory.router.weight, whole["learned.Allocation.weight"][number])


def test_tokens_attention_and_routers_train_together(tmp_path, monkeypatch):
    objectives = [TOKENS, ATTENTION, router(prefill="allocated")]
    config = config_of(tmp_path, objectives=objectives, model__init_args__num_iterations=2, trainer__max_steps=4)
    hybridmem(monkeypatch, "fit", "--config", config)
    weights = load_checkpoint(str(tmp_path / "run" / "step=4.ckpt"))["state_dict"]
    start = load_policy(str(tmp_path / "policy")).state_dict()
    assert any(not torch.equal(weights[f"model.{name}"], tensor) for name, tensor in start.items())
    assert max(logged(tmp_path, "sampling/sampling_logp_difference/max")) < 1e-4


def test_routers_and_allocations_are_different_starts(tmp_path, monkeypatch, capsys):
    config = config_of(tmp_path, trainer__max_steps=2)
    hybridmem(monkeypatch, "fit", "--config", config)
    start = str(tmp_path / "run" / "step=2.ckpt")
    other = config_of(tmp_path, objectives=[router(init_from=start)])
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", other, "--trainer.default_root_dir", str(tmp_path / "other"))
    assert "was trained with other units: weight is absent, here [2, 16]" in capsys.readouterr().err
    file = tmp_path / "start.json"
    Allocation("base", 4, 1, [["full", "none"], ["none", "full"]]).save(file)
    other = config_of(tmp_path, objectives=[router(init_from=str(file))])
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", other, "--trainer.default_root_dir", str(tmp_path / "other"))
    assert "names open heads, and routers of tokens or writes open none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("objectives", "callbacks", "message"),
    [
        ([TOKENS, router(estimator="mixed")], [], "unit=token needs AllocationRL with estimator=sampled"),
        (
            [{"class_path": "hybridmem.rl.AllocationSFT", "init_args": {"unit": "token"}}],
            [],
            "unit=token needs AllocationRL",
        ),
        ([router()], [CURVE], "unit=token has none: use RoutedTokens"),
        ([router()], [{"class_path": "hybridmem.training.AllocationMaps"}], "use RoutedTokens with unit=token"),
        ([allocation()], [DRAWN], "set unit of AllocationRL to token"),
    ],
)
def test_settings_that_cannot_work(tmp_path, monkeypatch, capsys, objectives, callbacks, message):
    config = config_of(tmp_path, objectives=objectives, trainer__callbacks=callbacks)
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
