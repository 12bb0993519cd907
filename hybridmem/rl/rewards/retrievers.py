"""Retrievers, which rank documents for search queries.

A retriever is a callable `retriever(queries, k)` that returns a list of at most k document ids per query, best first,
or None for a query on which it failed. Rewards treat retrievers as black boxes.
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

TERM = re.compile(r"[^\W_]+")  # runs of letters and digits; underscores and hyphens separate terms

logger = logging.getLogger(__name__)


class BM25:
    """BM25 over a JSONL file of documents, implemented with bm25s (`pip install hybridmem[rank]`).

    Terms are lower-case runs of letters and digits; repeated terms in a query count repeatedly. Documents that share no
    term with the query are not returned.

    Args:
        path: a JSONL file with one document per line.
        id_column: the column with the document's id.
        text_columns: the columns with the document's text; missing and null values count as empty.
        k1, b: BM25's term saturation and length normalisation.

    Raises:
        ImportError: bm25s is not installed.
        FileNotFoundError, ValueError: The file does not exist, a line is not a document, ids repeat, or no document has
            text.
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
                raise ValueError(
                    f"{name} lacks id_column={id_column!r}; set id_column to one of its columns {sorted(record)}"
                )
            identifier = str(record[id_column])
            if identifier in documents:
                raise ValueError(f"{name} repeats the id {identifier!r} of an earlier document; make ids unique")
            documents[identifier] = "\n".join(str(record[c]) for c in text_columns if record.get(c) is not None)
        self._index(
            documents, k1, b, f"path={str(path)!r}: no document has a word in text_columns={list(text_columns)}"
        )

    @classmethod
    def of(cls, documents: Mapping[str, str], k1: float = 1.5, b: float = 0.75) -> "BM25":
        """Build the index from documents in memory, given as a mapping from id to text."""
        index = cls.__new__(cls)
        index._index(documents, k1, b, "BM25 needs at least one document that contains a word")
        return index

    def _index(self, documents: Mapping[str, str], k1: float, b: float, without_words: str) -> None:
        try:
            import bm25s
        except ModuleNotFoundError as error:
            raise ImportError("BM25 needs bm25s: pip install hybridmem[rank]") from error
        texts = [terms(text) for text in documents.values()]
        if not any(texts):
            raise ValueError(without_words)
        self.ids = list(documents)
        self.index = bm25s.BM25(k1=k1, b=b)
        self.index.index(texts, show_progress=False)

    def __call__(self, queries: list[str], k: int) -> Found:
        """Return the ids of the best k documents for each query."""
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
    """Retriever at an HTTP endpoint: POST {"queries": […], "k": k} returns {"results": [[id, …], …]}.

    A failed batch gives None for all its queries, which count in `failures`.

    Args:
        url, timeout, retries, backoff, max_bytes, headers: see Endpoint; the timeout applies to one batch.
        batch_size: the number of queries per request.

    Raises:
        ValueError: A setting is out of range.
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
        """Return the ids of the best k documents for each query, or None for failed queries."""
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
    """Validate a retriever's results for `count` queries; return at most k ids as strings, or None, per query.

    Raises:
        ValueError: The results are not a list with a list of ids, or None, per query.
    """
    if not isinstance(results, list) or len(results) != count:
        raise ValueError(f"a retriever must return one list of ids for each of {count} queries: {str(results)[:200]!r}")
    for ids in results:
        if ids is not None and not (isinstance(ids, list) and all(isinstance(one, str | int) for one in ids)):
            raise ValueError(f"a retriever must return ids as strings or integers: {str(ids)[:200]!r}")
    return [None if ids is None else [str(one) for one in ids[:k]] for ids in results]


def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (location for error messages, object) for each line of a JSONL file, compressed or not.

    Raises:
        FileNotFoundError, ValueError: The file does not exist or cannot be decompressed, or a line is no JSON object.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r} does not exist or is not a file")
    for number, line in enumerate(lines_of(Path(path)), start=1):  # bytes, so that UTF-8 errors name their line
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number} is of type {type(record).__name__}, not a JSON object")
        yield f"{path}:{number}", record


def terms(text: str) -> list[str]:
    """Split text into BM25 terms."""
    return TERM.findall(text.lower())
