"""Batches from a stream of documents that is too long to keep, and going on exactly where one stopped.

Documents are read in blocks. A block is shuffled, cut into rows like a small corpus and then forgotten, so a place
in the stream is a few numbers: where the block began, and how many of its rows are used.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from hashlib import blake2b
from itertools import islice
from typing import Any, TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from transformers import PreTrainedTokenizerBase

from .corpora import Document
from .order import permutation
from .packing import PackedRows, Row
from .tokens import Corpus, tokenize

Batch = dict[str, Int64[Tensor, "batch time"]]


class Place(TypedDict):
    """A place in one worker's stream; only what a checkpoint can hold."""

    passes: int  # how often all documents were read before
    documents: dict[str, Any] | None  # the state of `datasets` where the block began; None: the pass's start
    block: int  # of this pass
    row: int  # rows of the block that are used


START = Place(passes=0, documents=None, block=0, row=0)


def digest(text: str) -> bytes:
    """What tells two texts apart."""
    return blake2b(text.encode(), digest_size=16).digest()


def texts_of(records: list[dict[str, Any]], text_column: str, source: str) -> list[str]:
    """The texts of records, without empty ones.

    Raises:
        ValueError: a record has something else there.
    """
    texts = [record.get(text_column) for record in records]
    other = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if other is not None:
        raise ValueError(f"text_column={text_column!r} of {source} holds {str(other)[:100]!r}, which is no text")
    return [text for text in texts if text]


def read_records(records: Iterable[Any], source: str) -> Iterator[Any]:
    """The records of a dataset; what `datasets` says of one that cannot be read gets the dataset's name.

    Raises:
        ValueError: naming `source`.
    """
    try:
        yield from records
    except Exception as error:  # of whichever library reads the format
        raise ValueError(f"{source} cannot be read: {type(error).__name__}: {error}") from error


def tokenize_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """The tokens of texts that are no files."""
    return tokenize([Document("a text of the stream", len(text), text.encode()) for text in texts], tokenizer)


class RowStream:
    """Rows without end, each with the place after it.

    All documents are read again and again, the files in another order each time. The last row of each block is
    padded. Document ids tell the documents of a row apart.

    Args:
        documents: a streaming dataset of `datasets`.
        text_column: its column that holds the text. Empty texts are skipped.
        held_out: digests of texts to leave out.
        tokenizer: what the texts go through.
        sequence_length: tokens of a row.
        block_size: documents that are read, shuffled and cut into rows together.
        seed: of the orders.
        source: what errors call the documents.
    """

    def __init__(
        self,
        documents: Any,
        *,
        text_column: str,
        held_out: set[bytes],
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        block_size: int,
        seed: int,
        source: str = "the dataset",
    ):
        self.source = source
        self.documents, self.text_column, self.held_out = documents, text_column, held_out
        self.tokenizer, self.sequence_length = tokenizer, sequence_length
        self.block_size, self.seed = block_size, seed

    def rows(self, start: Place) -> Iterator[tuple[Row, Place]]:
        """Rows from a place on, each with the place after it."""
        for texts, place in self.blocks(start):
            corpus = tokenize_texts(texts, self.tokenizer)
            rows = PackedRows(corpus, self.sequence_length, seed=self.seed, pad=True)
            order = permutation(len(rows), self.seed, place["passes"], place["block"])
            for turn in range(place["row"], len(rows)):
                yield rows[int(order[turn])], Place(**{**place, "row": turn + 1})

    def blocks(self, place: Place) -> Iterator[tuple[list[str], Place]]:
        """The texts of each block that has any, with its place."""
        while True:
            found = place["documents"] is not None  # an earlier block had some
            for texts, block_place in self.blocks_of_pass(place):
                if texts:
                    found = True
                    yield texts, block_place
            if not found:
                raise ValueError(
                    f"no document is left to train on: those of text_column={self.text_column!r} are empty, or "
                    "val_documents takes them all"
                )
            place = Place(passes=place["passes"] + 1, documents=None, block=0, row=0)

    def blocks_of_pass(self, place: Place) -> Iterator[tuple[list[str], Place]]:
        """The blocks of one reading of all documents, from a place on."""
        # A copy, because its epoch is shared with other workers and a state once loaded stays.
        documents = deepcopy(self.documents)
        documents.set_epoch(1 + place["passes"] + self.seed * 1_000_003)  # the order of files; 0 is as they stand
        if place["documents"] is not None:
            documents.load_state_dict(place["documents"])
        records = read_records(documents, self.source)
        while block := list(islice(records, self.block_size)):
            texts = texts_of(block, self.text_column, self.source)
            yield [text for text in texts if digest(text) not in self.held_out], place
            place = Place(passes=place["passes"], documents=documents.state_dict(), block=place["block"] + 1, row=0)


class WorkerBatches(IterableDataset):
    """What each worker of a DataLoader makes of a stream: batches, and the place after each."""

    def __init__(self, stream: RowStream, batch_size: int, places: list[Place]):
        self.stream, self.batch_size, self.places = stream, batch_size, places

    def __iter__(self) -> Iterator[tuple[Batch, Place]]:
        worker = get_worker_info()
        rows = self.stream.rows(self.places[worker.id if worker else 0])
        while True:
            taken = list(islice(rows, self.batch_size))
            yield default_collate([row for row, _ in taken]), taken[-1][1]


class StreamLoader:
    """Batches from workers in turn, from batch `position()` on, remembering how to come back to it.

    What was fetched ahead does no harm: places are kept by the number of the batch that begins there.

    Args:
        stream: the rows; each worker reads its share of the documents.
        batch_size: rows of a batch.
        num_workers: processes that read; 0 reads here.
        position: how many batches were used.
        places: where the workers begin, after a resume; None: at the start.
    """

    def __init__(
        self,
        stream: RowStream,
        batch_size: int,
        *,
        num_workers: int,
        position: Callable[[], int],
        places: list[Place] | None = None,
    ):
        self.stream, self.batch_size = stream, batch_size
        self.num_workers, self.position = num_workers, position
        self.turns = max(1, num_workers)
        self.starts = dict(enumerate(places or [START] * self.turns, start=self.first_turn()))

    def first_turn(self) -> int:
        """The batch at which the first worker had its last turn: iteration can only begin with that worker."""
        return self.position() // self.turns * self.turns

    def places(self) -> list[Place]:
        """Where each worker has to begin to go on from `position()`."""
        first = self.first_turn()
        return [self.starts[number] for number in range(first, first + self.turns)]

    def __iter__(self) -> Iterator[Batch]:
        position, first = self.position(), self.first_turn()
        loader = DataLoader(
            WorkerBatches(self.stream, self.batch_size, self.places()),
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),
        )
        for number, (batch, place_after) in enumerate(loader, start=first):
            self.starts[number + self.turns] = place_after
            for old in [key for key in self.starts if key < self.first_turn()]:
                del self.starts[old]
            if number >= position:
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Empty: the places are in the data module's state. Having one tells Lightning that it need not warn."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
