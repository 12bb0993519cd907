"""Retrievers: what a query finds, best first. To rewards each is a black box.

A retriever is a callable, `retriever(queries, k)`, that gives a list of at most k document ids for each query, or None
for a query that it failed on.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridmem.checks import at_least
from hybridmem.files import lines_of

from .http import Endpoint, EndpointError

Found = list[list[str] | None]
Retriever = Callable[[list[str], int], Found]

TERM = re.compile(r"[^\W_]+")  # letters and digits; what a word is joined with separates

logger = logging.getLogger(__name__)


class BM25:
    """BM25 over a JSONL file of documents, by bm25s (`pip install hybridmem[rank]`).

    Terms are runs of letters and digits in lower case; a term that a query repeats counts as often. A document that
    shares no term with the query is not found.

    Args:
        path: a JSON object a line.
        id_column: where a document's id stands.
        text_columns: where its text stands; one that is missing or null is empty.
        k1, b: how soon repeated terms stop counting, and how much a document's length does.

    Raises:
        ImportError: bm25s is not installed.
        FileNotFoundError, ValueError: no such file, a line that is no document, an id twice, or no documents.
    """

    def __init__(
        self,
        path: str | Path,
        id_column: str = "id",
        text_columns: Sequence[str] = ("text",),
        k1: float = 1.5,
        b: float = 0.75,
    ):
        documents: dict[str, str] = {}
        for name, record in read_jsonl(path):
            if id_column not in record:
                raise ValueError(f"{name} has no id in the column id_column={id_column!r} (it has {sorted(record)})")
            identifier = str(record[id_column])
            if identifier in documents:
                raise ValueError(f"{name} has the id {identifier!r} of an earlier document: ids must differ")
            documents[identifier] = "\n".join(str(record[c]) for c in text_columns if record.get(c) is not None)
        self._index(
            documents, k1, b, f"path={str(path)!r}: no document has a word in text_columns={list(text_columns)}"
        )

    @classmethod
    def of(cls, documents: Mapping[str, str], k1: float = 1.5, b: float = 0.75) -> "BM25":
        """The same over documents in memory, texts by id."""
        index = cls.__new__(cls)
        index._index(documents, k1, b, "BM25 has nothing to search: no document has a word")
        return index

    def _index(self, documents: Mapping[str, str], k1: float, b: float, without_words: str) -> None:
        try:
            import bm25s
        except ModuleNotFoundError as error:
            raise ImportError("BM25 searches with `bm25s`: pip install hybridmem[rank]") from error
        texts = [terms(text) for text in documents.values()]
        if not any(texts):
            raise ValueError(without_words)
        self.ids = list(documents)
        self.index = bm25s.BM25(k1=k1, b=b)
        self.index.index(texts, show_progress=False)

    def __call__(self, queries: list[str], k: int) -> Found:
        """The ids of the best k documents for each query."""
        known = [[term for term in terms(query) if term in self.index.vocab_dict] for query in queries]
        asked = [number for number, query in enumerate(known) if query]
        found: Found = [[] for _ in queries]
        if asked:
            k = min(k, len(self.ids))
            ranked = self.index.retrieve([known[number] for number in asked], k=k, show_progress=False)
            for number, rows, scores in zip(asked, ranked.documents, ranked.scores, strict=True):
                found[number] = [self.ids[row] for row, score in zip(rows, scores, strict=True) if score > 0]
        return found


class HTTPRetriever:
    """A retriever on another machine: POST {"queries": […], "k": k} gives {"results": [[id, …], …]}.

    A batch without a usable answer gives None for its queries, which are counted in `failures`.

    Args:
        url, timeout, retries, backoff, max_bytes, headers: see Endpoint; the timeout is for one batch.
        batch_size: queries of a request.

    Raises:
        ValueError: a setting that cannot work.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 10.0,
        retries: int = 3,
        batch_size: int = 64,
        backoff: float = 0.5,
        max_bytes: int = 1 << 22,
        headers: dict[str, str] | None = None,
    ):
        at_least(1, batch_size=batch_size)
        self.endpoint = Endpoint(
            url=url, timeout=timeout, retries=retries, backoff=backoff, max_bytes=max_bytes, headers=headers
        )
        self.batch_size = batch_size
        self.failures = 0

    def __call__(self, queries: list[str], k: int) -> Found:
        """What each query finds."""
        found: Found = []
        for start in range(0, len(queries), self.batch_size):
            found += self._ask(queries[start : start + self.batch_size], k)
        return found

    def _ask(self, queries: list[str], k: int) -> Found:
        try:
            answer = self.endpoint.post({"queries": queries, "k": k})
            return checked(answer.get("results") if isinstance(answer, dict) else None, len(queries), k)
        except (EndpointError, ValueError) as error:
            self.failures += len(queries)
            logger.warning("retriever failed on %d queries (%d so far): %s", len(queries), self.failures, error)
            return [None] * len(queries)


def checked(results: Any, count: int, k: int) -> Found:
    """What a retriever gave, if it is a list of ids, or None, for each of `count` queries; the first k ids each.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(results, list) or len(results) != count:
        raise ValueError(f"a retriever must give a list of ids for each of {count} queries, not {str(results)[:200]!r}")
    for ids in results:
        if ids is not None and not (isinstance(ids, list) and all(isinstance(one, str | int) for one in ids)):
            raise ValueError(f"what a query finds must be a list of ids, not {str(ids)[:200]!r}")
    return [None if ids is None else [str(one) for one in ids[:k]] for ids in results]


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, compressed or not, each with what errors call it.

    Raises:
        FileNotFoundError, ValueError: no such file, one that cannot be decompressed, or a line that is no JSON object.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r} is no file")
    for number, line in enumerate(lines_of(Path(path)), start=1):  # as bytes: what is not UTF-8 is an error of its line
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number} is no JSON object but {type(record).__name__}")
        yield f"{path}:{number}", record


def terms(text: str) -> list[str]:
    """The words that BM25 compares."""
    return TERM.findall(text.lower())
