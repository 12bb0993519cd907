"""BM25, and HTTP retrievers, whose failures affect only their own queries."""

import gzip
import json
import logging

import pytest

from hybridmem.rl import BM25, HTTPRetriever
from tests.hybridmem.rl.servers import as_json, serving

DOCUMENTS = {
    "hub": "usb_c hub with seven ports",
    "cable": "usb cable, usb c to usb a",
    "lamp": "desk lamp",
    "empty": "",
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_finds_documents_with_common_words():
    find = BM25.of(DOCUMENTS)
    assert find(["USB ports", "lamp", "nothing of it", ""], 10) == [["hub", "cable"], ["lamp"], [], []]
    assert find(["usb"], 1) == [["cable"]]


def test_reads_jsonl(tmp_path):
    desk, lamp = {"no": 1, "title": "desk", "body": None}, {"no": "2", "title": "a", "body": "lamp"}
    path = write(tmp_path / "d.jsonl", desk, lamp)
    assert BM25(path, id_column="no", text_columns=("title", "body"))(["lamp desk", "lamp"], 5)[1] == ["2"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": 1, "text": "a b"}', '{"id": "1", "text": "c"}'], ":2 repeats the id '1' of an earlier"),
        (['{"text": "a"}'], "id_column='id'"),
        (["[1]"], "is of type list, not a JSON object"),
        (["{"], ":1 is not JSON"),
        (['{"id": 1, "text": "--"}'], r"d\.jsonl.*: no document has a word in text_columns=\[.text.\]"),
    ],
)
def test_bad_files_are_named(tmp_path, lines, message):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        BM25(path)


def test_a_compressed_file(tmp_path):
    lines = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in DOCUMENTS.items())
    path = tmp_path / "documents.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    assert BM25(path).ids == BM25.of(DOCUMENTS).ids
    path.write_bytes(gzip.compress(lines.encode())[:-9])
    with pytest.raises(ValueError, match=r"documents\.jsonl\.gz cannot be decompressed"):
        BM25(path)


def test_missing_file_and_missing_library(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        BM25(tmp_path / "none.jsonl")
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"hybridmem\[rank\]"):
        BM25.of(DOCUMENTS)


def test_http_in_batches():
    with serving(lambda body, _: as_json({"results": [[q, 7] for q in body["queries"]]})) as (url, requests):
        retriever = HTTPRetriever(url, batch_size=2)
        assert retriever(["a", "b", "c"], 5) == [["a", "7"], ["b", "7"], ["c", "7"]]
        assert retriever(["a"], 1) == [["a"]]
    assert [request["body"] for request in requests[:2]] == [
        {"queries": ["a", "b"], "k": 5},
        {"queries": ["c"], "k": 5},
    ]
    assert retriever.failures == 0


@pytest.mark.parametrize(
    "rubbish", [{}, [], {"results": [["x"]]}, {"results": ["xx", "yy"]}, {"results": [[{}], [None]]}, None]
)
def test_http_rubbish_costs_its_batch_alone(rubbish, caplog):
    def answer(body, _):
        return as_json(rubbish if "bad" in body["queries"] else {"results": [["x"]] * len(body["queries"])})

    with serving(answer) as (url, _), caplog.at_level(logging.WARNING):
        retriever = HTTPRetriever(url, batch_size=2, retries=0)
        assert retriever(["a", "bad", "b"], 5) == [None, None, ["x"]]
    assert retriever.failures == 2
    assert "failed on 2 queries" in caplog.text
