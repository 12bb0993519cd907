"""Allocations by reward from the command line: the model stays frozen, φ moves, runs resume exactly."""

import json

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from hybridmem import HybridMemForCausalLM
from hybridmem.convert import Allocation, convert
from hybridmem.rl import FixedAllocation
from hybridmem.rl.attention.sources import find_units
from hybridmem.training.checkpoints.contents import load_policy
from hybridmem.training.checkpoints.loading import load_checkpoint
from tests.hybridmem.convert.bases import base_model
from tests.hybridmem.training.policy.test_module import ATTENTION, TOKENS, Letters, write_config
from tests.hybridmem.training.runs import hybridmem, logged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def allocation(**settings):
    return {"class_path": "hybridmem.rl.AllocationRL", "init_args": {"attention_window": 4, **settings}}


def config_of(folder, kind="converted", objectives=None, **changes):
    """A configuration for a converted model, or another."""
    settings = {"model__init_args__num_iterations": 1, "model__init_args__objectives": objectives or [allocation()]}
    file = write_config(folder, "llama" if kind in ("llama", "converted") else kind, **settings | changes)
    if kind == "converted":
        model = LlamaForCausalLM.from_pretrained(folder / "policy")
        convert(model, attention_window=8, num_sink_tokens=1).save_pretrained(folder / "policy")
    return file


@pytest.mark.parametrize("kind", ["converted", "llama", "mag"])
def test_a_frozen_model_learns_an_allocation(tmp_path, monkeypatch, kind):
    objectives = [allocation(attention_window=None if kind == "mag" else 4)]
    hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path, kind, objectives))
    checkpoint = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]
    start = load_policy(str(tmp_path / "policy")).state_dict()
    assert all(torch.equal(checkpoint[f"model.{name}"], tensor) for name, tensor in start.items())
    assert (checkpoint["learned.Allocation.logits"] - 1.3863).abs().max() > 0.01
    assert checkpoint["learned.Allocation.num_rollouts"] == 6
    for name in ("allocation/closed", "allocation/price", "allocation/cost", "reward", "val/accuracy"):
        assert logged(tmp_path, name), name
    assert not logged(tmp_path, "entropy")  # no pass over the responses


@pytest.mark.parametrize(
    "objectives",
    [
        [allocation(budget=0.5, prefill="allocated")],
        [TOKENS, allocation(source="none")],
        [TOKENS, allocation(estimator="mixed")],
    ],
    ids=["budget", "tokens", "mixed"],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, monkeypatch, objectives):
    config = config_of(tmp_path, objectives=objectives)
    hybridmem(monkeypatch, "fit", "--config", config)
    whole = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]
    again = ("--trainer.default_root_dir", str(tmp_path / "again"))
    hybridmem(monkeypatch, "fit", "--config", config, *again, "--ckpt_path", str(tmp_path / "run" / "step=2.ckpt"))
    resumed = load_checkpoint(str(tmp_path / "again" / "step=6.ckpt"))["state_dict"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_tokens_and_allocation_train_together(tmp_path, monkeypatch):
    config = config_of(tmp_path, objectives=[TOKENS, ATTENTION, allocation()], model__init_args__num_iterations=2)
    hybridmem(monkeypatch, "fit", "--config", config)
    weights = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]
    start = HybridMemForCausalLM.from_pretrained(tmp_path / "policy").state_dict()
    assert any(not torch.equal(weights[f"model.{name}"], tensor) for name, tensor in start.items())
    assert max(logged(tmp_path, "sampling/sampling_logp_difference/max")) < 1e-4


def test_frozen_weights_in_bfloat16(tmp_path, monkeypatch):
    hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path), "--model.init_args.dtype", "bfloat16")
    weights = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]
    assert weights["model.model.embed_tokens.weight"].dtype == torch.bfloat16
    assert weights["learned.Allocation.logits"].dtype == torch.float32


@pytest.mark.parametrize(
    ("objectives", "changes", "message"),
    [
        ([allocation(budget=0.1)], {}, "opens none of 4 units: give at least 0.25"),
        ([allocation(budget=1.5)], {}, "budget=1.5 must lie between 0 and 1"),
        ([allocation(budget=0.017)], {}, "budget=0.017 cannot be met"),
        ([allocation(budget=0.5)], {"num_generations": 1}, "num_generations=1 gives every response an advantage of 0"),
        ([allocation(unit="expert")], {}, "unit"),
        ([allocation()], {"num_generations": 2}, "sample 3 or more"),
        ([allocation(source="memory")], {}, "has no memory"),
        ([allocation()], {"lora": "{target_modules: [q_proj]}"}, "no objective trains the model"),
        ([allocation(estimator="mixed")], {}, "add GRPO"),
        ([TOKENS, allocation()], {"dtype": "bfloat16"}, "for weights that are not trained"),
        (
            [{"class_path": "hybridmem.rl.AttentionRL", "init_args": {"exploration": 1.0}}, allocation()],
            {},
            "exploration: 0",
        ),
        ([{"class_path": "hybridmem.rl.DAPO"}, allocation()], {}, "is incompatible with dynamic_sampling"),
    ],
)
def test_settings_that_cannot_work(tmp_path, monkeypatch, capsys, objectives, changes, message):
    options = [item for name, value in changes.items() for item in (f"--model.init_args.{name}", str(value))]
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path, objectives=objectives), *options)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (tmp_path / "run" / "step=2.ckpt").exists()


@pytest.mark.parametrize(("name", "earned"), [("Silent", 0), ("Generous", 99)])
def test_a_constant_reward_stops_before_the_first_rollout(tmp_path, monkeypatch, capsys, name, earned):
    task = {"data__init_args__task": f"tests.hybridmem.training.policy.test_module.{name}"}
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path, **task))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "AllocationRL learns nothing from a constant reward" in error
    assert f"all responses to 20 prompts earned {earned}" in error
    assert not logged(tmp_path, "reward")


def test_validation_answers_by_the_fixed_allocation(tmp_path, monkeypatch):
    config = config_of(tmp_path, objectives=[allocation(budget=0.5)])
    hybridmem(monkeypatch, "fit", "--config", config)
    last = logged(tmp_path, "val/reward")[-1]
    settings = yaml.safe_load(config.read_text())
    found = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]["learned.Allocation.logits"]
    opened = torch.zeros(4, dtype=torch.bool)
    opened[found.flatten().argsort(descending=True, stable=True)[:2]] = True
    model = HybridMemForCausalLM.from_pretrained(tmp_path / "policy", attention_window=4)
    model.set_head_sources([["full" if head else "none" for head in layer] for layer in opened.view(2, 2).tolist()])
    model.save_pretrained(tmp_path / "fixed")
    settings["model"]["init_args"] |= {"model": str(tmp_path / "fixed"), "objectives": [TOKENS]}
    (tmp_path / "fixed.yaml").write_text(json.dumps(settings))
    hybridmem(monkeypatch, "validate", "--config", tmp_path / "fixed.yaml")
    assert abs(logged(tmp_path, "val/reward")[-1] - last) < 1e-6


@pytest.mark.parametrize("kind", ["converted", "llama"])
def test_an_exported_folder_reads_by_the_learned_allocation(tmp_path, monkeypatch, kind):
    config = config_of(tmp_path, kind, [allocation(budget=0.5, num_sink_tokens=2)])
    hybridmem(monkeypatch, "fit", "--config", config)
    hybridmem(monkeypatch, "export", "--ckpt_path", tmp_path / "run" / "step=6.ckpt", "--output", tmp_path / "exported")
    model = HybridMemForCausalLM.from_pretrained(tmp_path / "exported")
    found = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]["learned.Allocation.logits"]
    opened = [source == "full" for layer in model.config.head_sources for source in layer]
    assert sum(opened) == 2
    assert min(found.flatten()[torch.tensor(opened)]) >= max(found.flatten()[~torch.tensor(opened)])
    assert (model.config.attention_window, model.config.num_sink_tokens) == (4, 2)


@pytest.mark.parametrize("objective", ["AllocationSFT", "AllocationDistillation"])
@pytest.mark.parametrize("kind", ["converted", "llama", "mag"])
def test_supervised_gates_leave_the_model_frozen(tmp_path, monkeypatch, objective, kind):
    settings = {"l1_price": 1.0, "budget": 0.5, "attention_window": None if kind == "mag" else 2}
    objectives = [{"class_path": f"hybridmem.rl.{objective}", "init_args": settings}]
    hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path, kind, objectives))
    checkpoint = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]
    start = load_policy(str(tmp_path / "policy")).state_dict()
    assert all(torch.equal(checkpoint[f"model.{name}"], tensor) for name, tensor in start.items())
    assert (checkpoint["learned.Allocation.logits"] < 1.3).all()  # the price closes every unit
    assert logged(tmp_path, "allocation/closed")[-1] > logged(tmp_path, "allocation/closed")[0]
    assert logged(tmp_path, "val/accuracy")


def test_an_exported_allocation_follows_averaged_weights(tmp_path, monkeypatch):
    """The average keeps every unit open while the price closes all; the file counts steps on given answers."""
    objective = {"class_path": "hybridmem.rl.AllocationSFT", "init_args": {"l1_price": 9.0, "lr": 1.0}}
    config = config_of(tmp_path, objectives=[objective])
    average = tmp_path / "average.yaml"
    average.write_text("trainer: {callbacks+: {class_path: lightning.pytorch.callbacks.EMAWeightAveraging}}")
    hybridmem(monkeypatch, "fit", "--config", config, "--config", average)
    checkpoint = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))
    assert (checkpoint["current_model_state"]["learned.Allocation.logits"] < 0).all()
    assert (checkpoint["state_dict"]["learned.Allocation.logits"] > 0).all()
    assert checkpoint["allocation"]["head_sources"] == [["full"] * 2] * 2
    assert checkpoint["allocation"]["trained"] == {"objective": "AllocationSFT", "steps": 6}


def test_distillation_is_zero_while_every_unit_is_open(tmp_path, monkeypatch):
    objective = {"class_path": "hybridmem.rl.AllocationDistillation", "init_args": {"l1_price": 0.0}}
    objective["init_args"] |= {"attention_window": 64, "initial": 0.5}  # no text is longer than the window
    hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path, objectives=[objective], trainer__max_steps=2))
    assert max(logged(tmp_path, "loss")) < 1e-10


def test_maps_are_drawn_during_training(tmp_path, monkeypatch):
    maps = [{"class_path": "hybridmem.training.AllocationMaps", "init_args": {"every_n_steps": 3}}]
    hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path, trainer__callbacks=maps))
    assert sorted(path.name for path in (tmp_path / "run" / "allocation_maps").iterdir()) == [
        "step_3.png",
        "step_6.png",
    ]


def test_maps_without_an_allocation_are_refused(tmp_path, monkeypatch, capsys):
    maps = [{"class_path": "hybridmem.training.AllocationMaps"}]
    config = config_of(tmp_path, objectives=[TOKENS], trainer__callbacks=maps)
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config)
    assert "add AllocationRL to objectives" in capsys.readouterr().err


def test_a_run_starts_from_another_runs_allocation(tmp_path, monkeypatch, capsys):
    hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path))
    first = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]["learned.Allocation.logits"]
    start = str(tmp_path / "run" / "step=6.ckpt")
    refined = config_of(
        tmp_path,
        objectives=[allocation(prefill="allocated", init_from=start, lr=1e-6)],
        trainer__default_root_dir=str(tmp_path / "refined"),
    )
    hybridmem(monkeypatch, "fit", "--config", refined)
    second = load_checkpoint(str(tmp_path / "refined" / "step=6.ckpt"))["state_dict"]["learned.Allocation.logits"]
    torch.testing.assert_close(second, first, rtol=0, atol=1e-4)
    other = config_of(tmp_path, "mag", [allocation(init_from=start, attention_window=None)])
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", other, "--trainer.default_root_dir", str(tmp_path / "other"))
    assert "was trained with other units" in capsys.readouterr().err


def test_a_run_starts_from_an_allocation_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "start.json"
    Allocation("base", 4, 1, [["full", "none"], ["none", "full"]]).save(file)
    config = config_of(tmp_path, objectives=[allocation(init_from=str(file), initial=0.9, lr=1e-6)])
    hybridmem(monkeypatch, "fit", "--config", config)
    logits = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]["learned.Allocation.logits"]
    torch.testing.assert_close(logits.sigmoid(), torch.tensor([[0.9, 0.1], [0.1, 0.9]]), rtol=0, atol=1e-4)
    Allocation("base", 4, 1, [["full", "none"]]).save(file)
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config, "--trainer.default_root_dir", str(tmp_path / "other"))
    assert "was trained with other units" in capsys.readouterr().err


def fixed(**settings):
    settings = {"attention_window": 4, "budget": 0.5, **settings}
    return {"class_path": "hybridmem.rl.FixedAllocation", "init_args": settings}


def heads_of(opened):
    """Return the sources of a model of two layers and two KV heads, with some heads open."""
    return [["full" if 2 * layer + head in opened else "none" for head in range(2)] for layer in range(2)]


@pytest.mark.parametrize("order", ["random", "last_layers"])
@pytest.mark.parametrize("kind", ["converted", "llama"])
def test_a_fixed_order_is_validated_and_exported(tmp_path, monkeypatch, kind, order):
    config = config_of(tmp_path, kind, [TOKENS, fixed(order=order, seed=3)], trainer__max_steps=2)
    hybridmem(monkeypatch, "fit", "--config", config)
    hybridmem(monkeypatch, "export", "--ckpt_path", tmp_path / "run" / "step=2.ckpt", "--output", tmp_path / "exported")
    chosen = torch.randperm(4, generator=torch.Generator().manual_seed(3)).tolist() if order == "random" else [3, 2]
    exported = HybridMemForCausalLM.from_pretrained(tmp_path / "exported")
    assert exported.config.head_sources == heads_of(chosen[:2])
    start = load_policy(str(tmp_path / "policy")).state_dict()
    weights = load_checkpoint(str(tmp_path / "run" / "step=2.ckpt"))["state_dict"]
    assert any(not torch.equal(weights[f"model.{name}"], tensor) for name, tensor in start.items())
    assert max(logged(tmp_path, "sampling/sampling_logp_difference/max")) < 1e-4  # scored as it was sampled


def test_random_heads_follow_the_seed_of_the_run(tmp_path, monkeypatch):
    config = config_of(tmp_path, objectives=[TOKENS, fixed()], trainer__max_steps=2)
    hybridmem(monkeypatch, "fit", "--config", config, "--seed_everything", "5")
    logits = load_checkpoint(str(tmp_path / "run" / "step=2.ckpt"))["state_dict"]["learned.Allocation.logits"]
    order = torch.randperm(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(logits.flatten().argsort(descending=True), order)


def test_a_mix_learns_while_the_model_stays_frozen(tmp_path, monkeypatch):
    config = config_of(tmp_path, objectives=[TOKENS, allocation(estimator="mixed")])
    hybridmem(monkeypatch, "fit", "--config", config, "--model.init_args.frozen", "true")
    checkpoint = load_checkpoint(str(tmp_path / "run" / "step=6.ckpt"))["state_dict"]
    start = load_policy(str(tmp_path / "policy")).state_dict()
    assert all(torch.equal(checkpoint[f"model.{name}"], tensor) for name, tensor in start.items())
    assert (checkpoint["learned.Allocation.logits"] - 1.3863).abs().max() > 0.01


@pytest.mark.parametrize(
    ("objectives", "options", "message"),
    [
        ([fixed()], (), "FixedAllocation learns nothing; add a token objective, or run hybridmem validate"),
        ([TOKENS, fixed(budget=None)], (), "give the share of units that stay open"),
        ([TOKENS], ("--model.init_args.frozen", "true"), "frozen=true leaves GRPO nothing to train"),
        ([allocation()], ("--model.init_args.frozen", "true", "--model.init_args.lora", "{}"), "remove one of the two"),
    ],
)
def test_runs_that_would_train_nothing_are_refused(tmp_path, monkeypatch, capsys, objectives, options, message):
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config_of(tmp_path, objectives=objectives), *options)
    assert message in capsys.readouterr().err


def test_closed_heads_read_the_memory_where_the_model_has_one(tmp_path):
    convert(base_model("llama", dtype=torch.float32), head_source="memory").save_pretrained(tmp_path / "memory")
    remembering = load_policy(str(tmp_path / "memory"))
    plain = convert(base_model("llama", dtype=torch.float32))
    closed = torch.zeros(2, 2, dtype=torch.bool)
    for model, source in ((remembering, "memory"), (plain, "none")):
        assert find_units(model, None, None, None).sources_of(closed) == [[source] * 2] * 2


CURVE = {"class_path": "hybridmem.training.AllocationCurve", "init_args": {"closed": [0.0, 0.5, 0.75, 1.0]}}


def test_the_curve_answers_with_the_likeliest_units_of_each_share(tmp_path, monkeypatch):
    """Units open in the order of φ, and a run with the budget of another share validates with its accuracy."""
    objective = fixed(order="last_layers", attention_window=2, num_sink_tokens=0)
    config = config_of(tmp_path, objectives=[objective], trainer__callbacks=[CURVE])
    opened = []
    likeliest = FixedAllocation.likeliest

    def watched(self, policy, share):
        found = likeliest(self, policy, share)
        opened.append(found.opened.flatten().tolist())
        return found

    monkeypatch.setattr(FixedAllocation, "likeliest", watched)
    monkeypatch.setattr(Letters, "is_right", lambda self, texts, answers: [text < "m" for text in texts], raising=False)
    hybridmem(monkeypatch, "validate", "--config", config)
    curve = {share: logged(tmp_path, f"val/accuracy_at/closed={share}") for share in ("0", "0.5", "0.75", "1")}
    assert curve["0.5"] == logged(tmp_path, "val/accuracy")
    assert all(0 <= value <= 1 for values in curve.values() for value in values)
    assert {tuple(row) for row in opened} == {
        (True, True, True, True),
        (False, False, True, True),
        (False, False, False, True),
        (False, False, False, False),
    }
    objective["init_args"]["budget"] = 0.25
    hybridmem(monkeypatch, "validate", "--config", config_of(tmp_path, objectives=[objective]))
    assert curve["0.75"] == logged(tmp_path, "val/accuracy")


def test_the_curve_is_logged_during_training(tmp_path, monkeypatch):
    config = config_of(tmp_path, trainer__callbacks=[CURVE], model__init_args__temperature=0.0)
    hybridmem(monkeypatch, "fit", "--config", config)
    assert len(logged(tmp_path, "val/accuracy_at/closed=0.5")) == 2
    assert logged(tmp_path, "val/pass@1") == logged(tmp_path, "val/accuracy")  # greedy, so samples are alike


@pytest.mark.parametrize(
    ("closed", "objectives", "message"),
    [
        ([0.5, 0.5], [allocation()], "must hold one or more different shares"),
        ([1.5], [allocation()], "from 0 to 1"),
        ([0.5], [TOKENS], "which no objective holds: add AllocationRL"),
    ],
)
def test_curves_that_cannot_be_measured_are_refused(tmp_path, monkeypatch, capsys, closed, objectives, message):
    curve = CURVE | {"init_args": {"closed": closed}}
    config = config_of(tmp_path, objectives=objectives, trainer__callbacks=[curve])
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config)
    assert message in capsys.readouterr().err
