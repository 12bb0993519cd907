"""Workspace folders on disk: demonstrations find the file, and paths outside the folder are rejected."""

from pathlib import Path

import pytest

from hybridmem.data import TaskDataModule, load_tokenizer
from hybridmem.rl.environments.tools import act
from hybridmem.tasks import Workspace

SPLITS = ("train", "val")


@pytest.fixture(scope="module", params=[False, True], ids=["open", "grep"])
def task(request):
    return Workspace(search=request.param)


def test_demonstrations_find_the_file_within_the_limits(task):
    for index in range(30):
        example = task.example("train", index)
        folder = task.environment()
        assert folder.reset(**example) is None
        for said, told in example["turns"]:
            assert not folder.done
            assert act(folder, said, "plain", 1000).observation == told
        assert folder.done
        assert folder.get_reward() == 1
        length = sum(len(said) + 1 + len(told) + 2 for said, told in example["turns"])
        assert length <= task.max_completion_length
        assert example == task.example("train", index)
    assert {task.example("val", index)["place"] for index in range(30)} == {0, 1, 2, 3}


def test_functions_are_held_out(task):
    assert not set(task.names["train"]) & set(task.names["val"])


def test_a_wrong_answer_earns_nothing_and_nothing_lies_outside(task, tmp_path):
    example = task.example("train", 0)
    folder = task.environment()
    folder.reset(**example)
    (tmp_path / "secret").write_text("x")
    for path in ("../secret", "/etc/hostname", str(tmp_path / "secret"), "z.py", ".", ""):
        told = act(folder, f"open {path}", "plain", 1000)
        assert told.failures == 1, path
    assert folder.get_reward() == 0
    wrong = next(name for name in example["files"] if name != example["answer"])
    assert act(folder, f"submit {wrong}", "plain", 1000).ended
    assert folder.get_reward() == 0
    folder.reset(**task.example("train", 1))
    assert not folder.done
    assert folder.ls() == "a.py b.py c.py d.py"


def test_observations_have_no_labels(task):
    data = TaskDataModule(task, batch_size=2)
    data.setup()
    example = task.example("train", 0)
    row = data.row(data.prompt(example).tokens, example)
    learnt = row["shift_labels"][row["shift_labels"] >= 0].tolist()
    said = [token for turn, _ in example["turns"] for token in (*turn.encode(), data.end_id)]
    assert learnt == said
    text = data.tokenizer.decode([*row["input_ids"].tolist(), said[-1]])
    for turn, told in example["turns"][:-1]:
        assert f"{turn}<|eos|>\n{told}\n" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_files=1), "num_files must be at least 2, not 1"),
        (dict(num_files=27), "num_files=27 must be at most 26"),
        (dict(max_line_length=-1), "max_line_length must be at least 1, not -1"),
        (dict(max_line_length=9), "max_line_length=9 leaves"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Workspace(**settings)


@pytest.mark.parametrize("search", [False, True])
def test_room_is_for_the_lines_that_there_are(search):
    assert Workspace(search=search, max_line_length=10**6).max_completion_length < 20_000


def test_the_tokenizer_of_the_configurations_writes_a_name_alike_wherever_it_stands():
    tokenizer = load_tokenizer(str(Path(__file__).parents[3] / "configs" / "tokenizers" / "calls"))
    task = Workspace(search=True)
    for index in range(100):
        example = task.example("val", index)
        (grep, told), (submit, _) = example["turns"]
        name = grep.removeprefix("grep ").removesuffix("(")
        pieces = " ".join(map(str, tokenizer(name)["input_ids"]))
        for text in (example["prompt"], grep, told):
            assert pieces in " ".join(map(str, tokenizer(text)["input_ids"]))
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
        asked = sum(len(tokenizer(text)["input_ids"]) for text in (grep, told, submit))
        assert asked < 0.8 * len(grep + told + submit)
