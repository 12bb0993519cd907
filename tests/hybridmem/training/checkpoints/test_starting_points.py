"""Missing starts of a run, and the commands that create them."""

import re
from pathlib import Path

import pytest
import yaml

from hybridmem.training.checkpoints.durable import DurableCheckpointIO
from hybridmem.training.checkpoints.starting_points import check_starting_points


def check(module: dict, data: dict | None = None, root: str = "runs/mine", configs: tuple = ()) -> None:
    check_starting_points({"init_args": module}, {"init_args": data or {}}, root, configs)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("module", "setting"),
    [
        (dict(model="a.ckpt"), "model"),
        (dict(base="a.ckpt"), "base"),
        (dict(init_from="a.ckpt"), "init_from"),
        (dict(objectives=[{}, dict(init_args=dict(teacher="a.ckpt"))]), "objectives.1.init_args.teacher"),
        (dict(objectives=[dict(init_args=dict(init_from="a.ckpt"))]), "objectives.0.init_args.init_from"),
    ],
)
def test_every_setting_that_names_a_start_is_checked(module, setting):
    with pytest.raises(FileNotFoundError, match=rf"^model\.init_args\.{re.escape(setting)}=a\.ckpt does not exist; "):
        check(module)
    Path("a.ckpt").touch()
    check(module)


def test_the_configuration_that_writes_a_checkpoint_is_found_among_neighbours():
    for name, root in [("other", "runs/other"), ("start", "runs/start")]:
        Path("configs", name).mkdir(parents=True)
        Path("configs", name, "run.yaml").write_text(yaml.safe_dump({"trainer": {"default_root_dir": root}}))
    Path("configs/overlay.yaml").write_text("# nothing\n")
    with pytest.raises(FileNotFoundError, match=r"create it first: hybridmem fit --config configs/start/run\.yaml$"):
        check(dict(model="runs/start/last.ckpt"), configs=("configs/other/run.yaml",))
    with pytest.raises(FileNotFoundError, match=r"give a checkpoint of hybridmem fit$"):
        check(dict(model="runs/nowhere/last.ckpt"), configs=("configs/other/run.yaml",))


def test_another_checkpoint_in_the_folder_is_named():
    DurableCheckpointIO().save_checkpoint({"a": 1}, "runs/start/step=3.ckpt")
    with pytest.raises(FileNotFoundError, match=r"the newest checkpoint there is runs/start/step=3\.ckpt$"):
        check(dict(model="runs/start/last.ckpt"))


def test_a_folder_is_converted_from_the_model_of_its_tokenizer():
    model = dict(model="runs/converted")
    with pytest.raises(FileNotFoundError, match=r"first: hybridmem convert --model owner/name --output runs/conv\w+$"):
        check(model, dict(tokenizer="owner/name"))
    with pytest.raises(FileNotFoundError, match=r"convert --model NAME --output runs/converted \(or export a check"):
        check(model, dict(tokenizer="runs/converted"))


@pytest.mark.parametrize("name", ["owner/name", "gpt2"])
def test_names_of_the_hub_are_left_to_transformers(name):
    check(dict(model=name))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "../model", "runs/model"])
def test_paths_are_not_taken_for_names_of_the_hub(name):
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        check(dict(model=name))
