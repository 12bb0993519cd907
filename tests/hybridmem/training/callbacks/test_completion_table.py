"""Completions of any content are logged unchanged and kept."""

import json

import markdown
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridmem.training import CompletionTable
from hybridmem.training.callbacks.completion_table import COLUMNS
from hybridmem.training.trackers import markdown_table
from tests.hybridmem.training.policy.test_module import write_config
from tests.hybridmem.training.runs import hybridmem

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
TABLE = {"class_path": "hybridmem.training.CompletionTable", "init_args": {"every_n_steps": 4, "num_rows": 3}}


def test_a_run_writes_tables_and_lines(tmp_path, monkeypatch):
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path, trainer__callbacks=[TABLE]))
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [4] * 8  # two prompts with four completions each
    assert len({row["prompt"] for row in rows}) == 2
    for row in rows:
        assert row["reward"] == sum(letter < "m" for letter in row["completion"]) / 2
    (folder,) = (tmp_path / "run" / "tensorboard").iterdir()
    board = EventAccumulator(str(folder)).Reload()
    (event,) = board.Tensors("completions/text_summary")
    assert event.step == 4
    assert event.tensor_proto.string_val[0].decode().count("\n") == 1 + 3


def test_a_cell_holds_any_text():
    text = "a | b\n<b>*x*</b> `c` $y$ \\ [z](w)"
    page = markdown.markdown(markdown_table(COLUMNS, [(text, "ok", 0.5), ("p", "", 1.0)]), extensions=["tables"])
    assert page.count("<td>") == 6
    assert page.count("<tr>") == 3
    for tag in ("<b>", "<em>", "<code>", "<a "):
        assert tag not in page
    assert "&lt;b&gt;" in page
    assert "↵" in page


@pytest.mark.parametrize("setting", ["every_n_steps", "num_rows"])
def test_settings_below_1_are_refused(setting):
    with pytest.raises(ValueError, match=f"{setting}=0"):
        CompletionTable(**{setting: 0})
