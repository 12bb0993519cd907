"""The examples run with tiny settings, and do what they promise."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.hybridmem.training.runs import write_text

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
FOLDER = Path(__file__).parents[1] / "examples"
MOST_LINES = 72
TINY = dict(steps=2, width=16, row=64)


def run(name: str, **settings) -> None:
    """Run an example as its command line does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *(f"--{option}={value}" for option, value in settings.items())])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> str:
    """A model that train_on_files saved, for the examples that begin with it."""
    folder = tmp_path_factory.mktemp("examples")
    run("train_on_files", path=write_text(folder / "text"), pattern="*.txt", **TINY, output=folder / "model")
    return str(folder / "model")


def test_train_on_files(tmp_path, capsys):
    run("train_on_files", path=write_text(tmp_path / "text"), pattern="*.txt", **TINY, output=tmp_path / "m")
    said = capsys.readouterr().out
    assert re.search(r"\d\.\d\d bits per byte", said)
    assert "Epoch" not in said
    assert "Trainable params" not in said
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_memory_in_my_model(capsys):
    run("memory_in_my_model", steps=30, pairs=2)
    difference = re.search(r"it differs by (\S+)", capsys.readouterr().out)
    assert float(difference[1]) < 1e-4


def test_rl_on_my_reward(text_model, tmp_path, capsys):
    run("rl_on_my_reward", model=text_model, steps=2, batch=4, group=2, output=tmp_path / "rl")
    assert capsys.readouterr().out.count("val/reward") == 2
    assert (tmp_path / "rl" / "model.safetensors").exists()


def test_environment(tmp_path, capsys):
    run("environment", warm_up=2, steps=2, games=2, folder=tmp_path)
    assert "val/turns" in capsys.readouterr().out


def test_plot_attention(text_model, tmp_path):
    run("plot_attention", model=text_model, layer=1, text="def area", output=tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000


@pytest.mark.slow
def test_compare(tmp_path):
    run("compare", architectures="[swa]", controls="[answers]", warm_up_steps=20, steps=20, width=16, output=tmp_path)
    assert "answers" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["command"].startswith("python ")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES
