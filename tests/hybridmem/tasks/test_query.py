"""Descriptions and documents from a small source folder and from the standard library."""

import math
from pathlib import Path

import numpy as np
import pytest

from hybridmem.data import load_tokenizer
from hybridmem.rl.rewards.ranking import parse_query, write_answer
from hybridmem.tasks import Query, Task
from hybridmem.tasks.query import documented_functions, words

SOURCE = '''
import nothing_like_it


class SocketServer:
    """Not a function."""

    def setTimeout(self):
        """Set the longest wait of {n} seconds.

        None waits for ever{n}.
        """

    async def close(self): "Close connection number {n}."


def undocumented():
    def inner():
        """Count {n} inner things."""


def blank():
    "   "
'''

USUAL = {
    "a",
    "an",
    "and",
    "are",
    "as",
    "by",
    "for",
    "from",
    "if",
    "in",
    "is",
    "it",
    "of",
    "on",
    "or",
    "return",
    "the",
    "to",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write ten files, one of which is not Python."""
    path = tmp_path_factory.mktemp("source")
    for n in range(9):
        (path / f"net_{n}.py").write_text(SOURCE.replace("{n}", str(n)))
    (path / "template.py").write_text("def $name(:")
    return path


def test_source_is_parsed_and_not_run(folder):
    found = {function.name: function for function in documented_functions(str(folder))}
    assert len(found) == 27
    function = found["net_3.SocketServer.setTimeout"]
    assert function.description == "Set the longest wait of 3 seconds."
    assert function.rest == "None waits for ever3."
    assert "net_3.undocumented.inner" in found


def test_words_of_identifiers():
    assert words("HTTPServer.setTimeout_2 (x)") == ["http", "server", "set", "timeout", "2", "x"]


def test_examples(folder):
    task = Query(path=str(folder), val_fraction=0.2)
    assert isinstance(task, Task)
    assert not set(task.descriptions["train"]) & set(task.descriptions["val"])
    for split in ("train", "val"):
        for index in range(20):
            example = task.example(split, index)
            description = example["prompt"].removesuffix("\n")
            assert description in task.descriptions[split]
            assert example["relevance"] == task.described[description]
            assert len(example["answer"]) + 1 <= task.max_completion_length
            assert example == task.example(split, index)


def test_the_target_keeps_words_by_chance(folder):
    description, rng = "Set the longest SSLTimeout of a set.", np.random.default_rng(0)
    drawn = [Query(path=str(folder), keep=0.5).target(description, rng).split() for _ in range(200)]
    assert all(drawn)
    assert {word for query in drawn for word in query} == {"set", "the", "longest", "ssl", "timeout", "of", "a"}
    assert sum(map(len, drawn)) / 200 == pytest.approx(4, abs=0.4)
    assert Query(path=str(folder), max_query_length=12, keep=0.999).target(description, rng) == "set the"
    assert Query(path=str(folder), keep=0.001).target(description, rng) == "set the longest ssl timeout of a set"


def test_words_in_any_order(folder):
    plain, shuffled = Query(path=str(folder)), Query(path=str(folder), shuffle=True)
    for split, least in (("train", 1), ("val", 0)):
        pairs = [(plain.example(split, index), shuffled.example(split, index)) for index in range(50)]
        moved = [other["prompt"] for one, other in pairs if other["prompt"] != one["prompt"]]
        assert least * 10 <= len(moved) <= least * 40
        assert all(sorted(one["prompt"].split()) == sorted(other["prompt"].split()) for one, other in pairs)
        assert all(
            set((parse_query(other["answer"], think=False) or "").split()) <= set(words(other["prompt"]))
            for _, other in pairs
        )


def test_every_line_of_the_training_functions(folder):
    few, many = Query(path=str(folder), val_fraction=0.3), Query(path=str(folder), val_fraction=0.3, every_line=True)
    assert many.descriptions["val"] == few.descriptions["val"]
    added = many.descriptions["train"][len(few.descriptions["train"]) :]
    trained = {name for description in few.descriptions["train"] for name in few.described[description]}
    assert added
    for line in added:
        assert line.startswith("None waits for ever")
        assert set(many.described[line]) <= trained


def test_reward(folder):
    task = Query(path=str(folder), k=3)
    name = "net_3.SocketServer.setTimeout"
    right, wrong = write_answer("ever3 net 3"), write_answer("inner things")
    rewards = task.reward([""] * 3, [right, wrong, "ever3"], [""] * 3, relevance=[[name]] * 3)
    assert rewards == [pytest.approx(1.1), 0, -2]


def test_reward_can_reach_further_down_than_the_metric(folder):
    found = Query(path=str(folder)).ranking.retriever(["waits for ever"], 1000)[0]
    query, last = write_answer("waits for ever"), found[-1]
    assert len(found) > 3
    assert Query(path=str(folder), k=3).reward([""], [query], [""], relevance=[[last]]) == [0]
    task = Query(path=str(folder), k=3, reward_k=1000)
    assert task.reward([""], [query], [""], relevance=[[last]]) == [pytest.approx(0.1 + 1 / math.log2(len(found) + 1))]
    assert task.ranking.k == 3


def test_thinking(folder):
    example = Query(path=str(folder), think=True).example("train", 0)
    assert example["answer"].startswith("<think></think><answer>")
    assert parse_query(example["answer"]) is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"reward_k": 0}, "reward_k must be at least 1"),
        ({"val_fraction": 1.0}, "val_fraction must lie"),
        ({"keep": 0.0}, "keep must lie between 0 and 1"),
        ({"max_query_length": 0}, "max_query_length must be at least 1"),
    ],
)
def test_settings_that_cannot_work(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        Query(path=str(folder), **settings)


def test_a_folder_without_functions(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    with pytest.raises(ValueError, match="no function with a docstring"):
        Query(path=str(tmp_path))


@pytest.mark.slow
def test_the_standard_library_leaves_room_above_the_description():
    """Random words of a description score worse than all of it, distinctive words better, and the name scores well."""
    task = Query()
    descriptions = task.descriptions["val"]
    relevance = [task.described[description] for description in descriptions]

    def score(queries):
        (scores,) = task.ranking.scores([write_answer(query) for query in queries], "ndcg", relevance=relevance)
        return sum(map(float, scores)) / len(scores)

    rng = np.random.default_rng(0)
    drawn = score([task.target(description, rng) for description in descriptions])
    whole = score(descriptions)
    telling = score([" ".join(w for w in words(description) if w not in USUAL) for description in descriptions])
    assert 0.2 < drawn < whole < telling < 0.5
    assert score([" ".join(words(names[0])) for names in relevance]) > 0.7


def test_the_tokenizer_of_the_configurations_writes_answers_as_they_are():
    folder = Path(__file__).parents[3] / "configs" / "tokenizers" / "docstrings"
    task, tokenizer = Query(), load_tokenizer(str(folder))
    for index in range(100):
        example = task.example("val", index)
        tokens = tokenizer(example["answer"])["input_ids"]
        assert tokenizer.decode(tokens) == example["answer"]
        assert len(tokens) < len(example["answer"]) / 2


def test_a_folder_by_a_relative_path_or_a_link(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "one.py").write_text(SOURCE)
    (tmp_path / "link").symlink_to(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    found = documented_functions(str(tmp_path / "source"))
    assert "one.SocketServer.close" in [function.name for function in found]
    assert documented_functions("source") == documented_functions("link") == found
