"""Batches from a stream of documents that exceeds memory, with exact resumption.

Documents are read in blocks. A block is shuffled, packed into rows like a small corpus, and discarded. A place in the
stream therefore consists of a few numbers: the start of the block, and the number of its rows that were used.
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
    """Place in one worker's stream, in types that a checkpoint can store."""

    passes: int  # complete passes over all documents
    documents: dict[str, Any] | None  # state of `datasets` at the start of the block; None: start of the pass
    block: int  # index of the block in this pass
    row: int  # number of used rows of the block


START = Place(passes=0, documents=None, block=0, row=0)


def digest(text: str) -> bytes:
    """Return a hash that identifies a text."""
    return blake2b(text.encode(), digest_size=16).digest()


def texts_of(records: list[dict[str, Any]], text_column: str, source: str) -> list[str]:
    """Return the non-empty texts of records.

    Raises:
        ValueError: A record has a value other than text.
    """
    texts = [record.get(text_column) for record in records]
    other = next((text for text in texts if text is not None and not isinstance(text, str)), None)
    if other is not None:
        raise ValueError(
            f"text_column={text_column!r} of {source} contains {str(other)[:100]!r} instead of text; set another column"
        )
    return [text for text in texts if text]


def read_records(records: Iterable[Any], source: str) -> Iterator[Any]:
    """Yield the records of a dataset, and add the dataset's name to errors of `datasets`.

    Raises:
        ValueError: A record cannot be read; the message contains `source`.
    """
    try:
        yield from records
    except Exception as error:  # depends on the library that reads the format
        raise ValueError(f"cannot read {source}: {type(error).__name__}: {error}") from error


def tokenize_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Tokenise texts that do not come from files."""
    return tokenize([Document("a text of the stream", len(text), text.encode()) for text in texts], tokenizer)


class RowStream:
    """Endless stream of rows, each with the place after it.

    All documents are read repeatedly, with the files in another order in each pass. The last row of each block is
    padded. Document ids distinguish the documents of a row.

    Args:
        documents: a streaming dataset of `datasets`.
        text_column: the column with the text. Empty texts are skipped.
        held_out: digests of texts to skip.
        tokenizer: the tokenizer of the texts.
        sequence_length: the number of tokens in a row.
        block_size: the number of documents that are read, shuffled and packed together.
        seed: seeds all orders.
        source: the dataset's name in error messages.
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
        """Yield the rows from a place on, each with the place after it."""
        for texts, place in self.blocks(start):
            corpus = tokenize_texts(texts, self.tokenizer)
            rows = PackedRows(corpus, self.sequence_length, seed=self.seed, pad=True)
            order = permutation(len(rows), self.seed, place["passes"], place["block"])
            for turn in range(place["row"], len(rows)):
                yield rows[int(order[turn])], Place(**{**place, "row": turn + 1})

    def blocks(self, place: Place) -> Iterator[tuple[list[str], Place]]:
        """Yield the texts of each non-empty block with the block's place."""
        while True:
            found = place["documents"] is not None  # an earlier block had texts
            for texts, block_place in self.blocks_of_pass(place):
                if texts:
                    found = True
                    yield texts, block_place
            if not found:
                raise ValueError(
                    f"no documents are left for training: text_column={self.text_column!r} is empty in all others, or "
                    "val_documents holds out all; lower val_documents or set another text_column"
                )
            place = Place(passes=place["passes"] + 1, documents=None, block=0, row=0)

    def blocks_of_pass(self, place: Place) -> Iterator[tuple[list[str], Place]]:
        """Yield the blocks of one pass over all documents, from a place on."""
        # Copy, because the epoch is shared with other workers, and a loaded state persists.
        documents = deepcopy(self.documents)
        documents.set_epoch(
            1 + place["passes"] + self.seed * 1_000_003
        )  # seeds the order of files; 0 would not shuffle
        if place["documents"] is not None:
            documents.load_state_dict(place["documents"])
        records = read_records(documents, self.source)
        while block := list(islice(records, self.block_size)):
            texts = texts_of(block, self.text_column, self.source)
            yield [text for text in texts if digest(text) not in self.held_out], place
            place = Place(passes=place["passes"], documents=documents.state_dict(), block=place["block"] + 1, row=0)


class WorkerBatches(IterableDataset):
    """Batches of one DataLoader worker's share of a stream, with the place after each batch."""

    def __init__(self, stream: RowStream, batch_size: int, places: list[Place]):
        self.stream, self.batch_size, self.places = stream, batch_size, places

    def __iter__(self) -> Iterator[tuple[Batch, Place]]:
        worker = get_worker_info()
        rows = self.stream.rows(self.places[worker.id if worker else 0])
        while True:
            taken = list(islice(rows, self.batch_size))
            yield default_collate([row for row, _ in taken]), taken[-1][1]


class StreamLoader:
    """Loader that takes batches from its workers in turn, and can resume at batch `position()`.

    Prefetching is harmless, because places are stored by the number of the batch that starts there.

    Args:
        stream: the rows; each worker reads its share of the documents.
        batch_size: the number of rows in a batch.
        num_workers: the number of reader processes; 0 reads in this process.
        position: returns the number of batches used.
        places: the workers' places after a resume; None starts from the beginning.
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
        """Return the last batch of the first worker, because every iteration starts with that worker."""
        return self.position() // self.turns * self.turns

    def places(self) -> list[Place]:
        """Return each worker's place for a resume at `position()`."""
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
        """Return an empty state, which silences Lightning's warning; the data module's state has the places."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing; the data module's state has the places."""
