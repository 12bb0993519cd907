"""Runs of a grid, and errors in grids that are found before any run."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hybridmem.compare import CONTROLS, Comparison
from hybridmem.compare.grid import (
    START,
    FitOptions,
    Objectives,
    Run,
    as_arguments,
    check_grid,
    fit_options,
    plan,
    without_attention,
)

CONFIGS = Path(__file__).parents[3] / "configs" / "rl"
RECALL = Comparison(
    warm_up=CONFIGS / "recall_warmup.yaml",
    train=CONFIGS / "recall.yaml",
    architectures={"swa": FitOptions(variant="swa"), "mag": FitOptions(variant="mag")},
    seeds=[0, 1],
)


def labels(task, architecture):
    cells = plan({"recall": task})[1]
    return [cell.label for cell in cells if cell.architecture == architecture and cell.seed == 0]


def test_every_cell_continues_its_seeds_warm_up():
    warm_ups, cells = plan({"recall": RECALL})
    assert [str(run) for run in warm_ups] == [
        "recall swa warm-up seed 0",
        "recall mag warm-up seed 0",
        "recall swa warm-up seed 1",
        "recall mag warm-up seed 1",
    ]
    assert len(cells) == 2 * 2 * (1 + len(CONTROLS))
    assert {cell.warm_up for cell in cells} == set(warm_ups)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def test_a_warm_up_may_begin_with_the_weights_of_an_easier_tasks():
    tasks = {"hard": replace(RECALL, init_from="easy"), "easy": replace(RECALL, seeds=[0, 1, 2])}
    check_grid(tasks)
    warm_ups, cells = plan(tasks)
    assert len(warm_ups) == len(set(warm_ups)) == 10
    for place, run in enumerate(warm_ups):
        options = fit_options(run, tasks[run.task], Path("runs"))
        if run.task == "easy":
            assert run.after is None
            assert "model.init_args.init_from" not in options
        else:
            assert (run.after.task, run.after.architecture, run.after.seed) == ("easy", run.architecture, run.seed)
            assert run.after in warm_ups[:place]
            assert options["model.init_args.init_from"] == f"runs/{run.after.folder}/last.ckpt"
    assert all(cell.after in warm_ups for cell in cells)
    assert not any("model.init_args.init_from" in fit_options(cell, tasks[cell.task], Path("runs")) for cell in cells)


@pytest.mark.parametrize(
    ("hard", "message"),
    [
        (
            dict(init_from="nowhere"),
            "tasks.hard.init_from='nowhere' is not another task of the grid; choose from easy, hard",
        ),
        (dict(init_from="hard"), "is not another task"),
        (dict(seeds=[0, 3]), "has no warm-up with the same seed 3"),
        (dict(architectures={"mag": FitOptions(variant="mag", num_hidden_layers=3)}), "no warm-up with the same mag"),
    ],
)
def test_weights_that_a_grid_does_not_make_are_refused(hard, message):
    with pytest.raises(ValueError, match=message):
        check_grid({"easy": RECALL, "hard": replace(RECALL, **{"init_from": "easy"} | hard)})


def test_weights_come_from_a_task_that_begins_without_any():
    chain = {"one": RECALL, "two": replace(RECALL, init_from="one"), "three": replace(RECALL, init_from="two")}
    with pytest.raises(ValueError, match=r"tasks.three.init_from='two' has an init_from itself; use 'one'"):
        check_grid(chain)


def test_cells_differ_in_their_objectives_alone():
    cells = [cell for cell in plan({"recall": RECALL})[1] if cell.architecture == "mag" and cell.seed == 0]
    options = [fit_options(cell, RECALL, Path("runs")) for cell in cells]
    for found in options:
        del found["model.init_args.objectives"], found["trainer.default_root_dir"]
    assert all(found == options[0] for found in options)


def test_unsupported_targets_of_an_architecture_are_skipped():
    task = replace(RECALL, targets=["attention", "memory"])
    assert labels(task, "swa") == [START, *CONTROLS]
    assert labels(task, "mag") == [
        START,
        "supervised",
        "token",
        "attention",
        "attention on memory",
        "token + attention",
        "token + attention on memory",
    ]


def test_a_control_is_run_again_with_the_mask_of_its_first_run():
    task = replace(RECALL, masked=["token"])
    assert labels(task, "mag") == [START, "supervised", "token", "token, masked", "attention", "token + attention"]
    masked = next(cell for cell in plan({"recall": task})[1] if cell.masked)
    assert masked.after == replace(masked, masked=False)
    assert masked.warm_up == masked.after.warm_up == masked.after.after
    options = fit_options(masked, task, Path("runs"))
    assert {
        "class_path": "hybridmem.training.SubnetworkMask",
        "init_args": {"mask": "runs/recall/swa/token/seed0/mask.safetensors"},
    } in options["trainer.callbacks+"]


def test_reward_on_attention_is_held_against_the_same_without_it():
    assert without_attention(RECALL) == {"attention": START, "token + attention": "token"}
    both = Objectives([{"class_path": "hybridmem.rl.GRPO"}, {"class_path": "hybridmem.rl.AttentionRL"}])
    assert without_attention(replace(RECALL, controls={"mine": both})) == {}
    mine = {"plain": Objectives(both[:1]), "mine": both}
    assert without_attention(replace(RECALL, controls=mine)) == {"mine": "plain"}


FIXED = Objectives([{"class_path": "hybridmem.rl.FixedAllocation", "init_args": {"budget": 0.1}}])
PRETRAINED = Comparison(
    warm_up=None,
    train=CONFIGS / "allocation.yaml",
    architectures={name: FitOptions({"model.init_args.model": f"runs/{name}"}) for name in ("window", "memory")},
    controls={"random heads": FIXED, "reward": Objectives([{"class_path": "hybridmem.rl.AllocationRL"}])},
    control_options={"reward": FitOptions({"model.init_args.temperature": 1.0})},
    seeds=[0, 1],
)


def test_cells_without_a_warm_up_start_from_the_model_of_their_architecture():
    check_grid({"facts": PRETRAINED})
    warm_ups, cells = plan({"facts": PRETRAINED})
    assert warm_ups == []
    assert [cell.label for cell in cells if cell.architecture == "memory" and cell.seed == 1] == [
        START,
        "random heads",
        "reward",
    ]
    for cell in cells:
        options = fit_options(cell, PRETRAINED, Path("runs"))
        assert cell.after is None
        assert options["model.init_args.model"] == f"runs/{cell.architecture}"
        assert ("model.init_args.frozen" in options) == (cell.control == START)
        assert ("model.init_args.temperature" in options) == (cell.control == "reward")


def test_controls_that_learn_nothing_are_validated():
    cells = plan({"facts": PRETRAINED})[1]
    assert {(cell.label, cell.command, cell.is_trained) for cell in cells} == {
        (START, "validate", False),
        ("random heads", "validate", False),
        ("reward", "fit", True),
    }


def test_an_easier_task_needs_a_warm_up():
    hard = replace(RECALL, init_from="easy")
    with pytest.raises(ValueError, match=r"tasks.hard.init_from='easy' has no warm-up"):
        check_grid({"easy": PRETRAINED, "hard": hard})
    with pytest.raises(ValueError, match=r"tasks.facts.init_from needs a warm-up"):
        check_grid({"easy": RECALL, "facts": replace(PRETRAINED, init_from="easy")})


def test_a_control_may_have_a_target_of_its_own():
    mine = Objectives([{"class_path": "hybridmem.rl.AttentionRL", "init_args": {"target": "allocation"}}])
    task = replace(RECALL, targets=["attention", "memory"], controls={"gate": mine})
    assert labels(task, "mag") == [START, "gate on allocation"]


def test_options_are_read_back_as_they_were():
    task = replace(
        RECALL, train_options=FitOptions({"trainer.max_steps": 3, "trainer.callbacks+": [{"class_path": "x"}]})
    )
    arguments = as_arguments(fit_options(Run("recall", "mag", 1, "token"), task, Path("runs")))
    read = {name: yaml.safe_load(value) for name, value in (argument[2:].split("=", 1) for argument in arguments)}
    assert read["trainer.max_steps"] == 3
    assert [part["class_path"] for part in read["trainer.callbacks+"]] == ["hybridmem.training.ComputeSpent", "x"]
    assert read["model.init_args.model"] == "runs/recall/mag/warm-up/seed1/last.ckpt"
    assert read["trainer.default_root_dir"] == "runs/recall/mag/token/seed1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(warm_up=Path("no.yaml")), "warm_up=no.yaml does not exist"),
        (dict(seeds=[]), "seeds is empty"),
        (dict(controls={0.1: Objectives()}), "does not read the name 0.1 as text"),
        (dict(masked=["tokens"]), "masked: 'tokens' is not trained in the grid; choose from supervised, token"),
        (dict(masked=[START]), "masked: 'start' is not trained in the grid"),
        (dict(control_options={"reward": FitOptions()}), "control_options: 'reward' is not a control; choose from"),
        (dict(warm_up=None), "architectures.swa: 'variant' is not an option of hybridmem fit"),
        (dict(warm_up=None, masked=["token"]), "masked needs a warm-up"),
        (dict(warm_up=None, warm_up_options=FitOptions({"trainer.max_steps": 1})), "warm_up_options needs a warm-up"),
        (dict(seeds=[1, 1]), "contains a seed twice"),
        (dict(targets=["gaze"]), "'gaze' is unknown; choose from attention"),
        (
            dict(architectures={"a": FitOptions(variant="rnn")}),
            r"architectures\.a: variant 'rnn' is unknown; choose from",
        ),
        (dict(controls={"start": Objectives()}), "is reserved for the warm-up"),
    ],
)
def test_invalid_grids_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        check_grid({"recall": replace(RECALL, **changes)})
