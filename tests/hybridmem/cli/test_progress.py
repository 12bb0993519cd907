"""The progress bar: one line with steps, time and metrics."""

import io
import re

import pytest
from rich.console import Console

from hybridmem.cli.progress import StepBar, with_bar
from tests.hybridmem.training.runs import hybridmem, write_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def drawn(monkeypatch):
    """A terminal of 80 columns, on which all bars draw."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr("hybridmem.cli.progress.StepBar", lambda: StepBar(console))
    return screen


def lines(screen):
    return [line for line in re.split(r"[\r\n]", CONTROL.sub("", screen.getvalue())) if line.strip()]


def test_one_line_of_steps(tmp_path, monkeypatch, drawn):
    config = write_config(tmp_path, trainer__num_sanity_val_steps=1)
    hybridmem(monkeypatch, "fit", "--config", config)
    shown = lines(drawn)
    assert all(len(line) <= 80 for line in shown)
    assert re.match(r"training +.* 6/6 +0:00:\d\d left 0:00:00 +loss \d\.\d+", shown[-1])
    assert not [line for line in shown if "Epoch" in line or "v_num" in line]


def test_evaluations_count_batches(tmp_path, monkeypatch, drawn):
    config = write_config(tmp_path)
    hybridmem(monkeypatch, "fit", "--config", config)
    checkpoint = tmp_path / "run" / "step=6.ckpt"
    for command, name in (("validate", "validating"), ("test", "testing"), ("predict", "predicting")):
        hybridmem(monkeypatch, command, "--config", config, "--ckpt_path", checkpoint)
        done = re.match(rf"{name} .* (\d+)/(\d+) ", lines(drawn)[-1])
        assert done[1] == done[2] != "0"


def test_another_bar_is_kept():
    own = StepBar()
    assert with_bar(own) == [own]
    assert [type(callback) for callback in with_bar(None)] == [StepBar]


def test_files_get_no_bar(tmp_path, monkeypatch, capfd):
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path))
    captured = capfd.readouterr()
    assert "6/6" not in captured.out + captured.err
