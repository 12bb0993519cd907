"""Rows of equal length, packed from documents of any length.

An item is a dict of three int64 tensors of shape (time,):

    input_ids      tokens
    shift_labels   the next tokens; -100 at the end of a document and at padding
    document_ids   the documents of the tokens; -1 at padding

    document   7 7 7 7 7 7 | 9 9 9 | 4 4 4 4          rows of 4; a row's last label is the next row's first input
    row 0      x x x x
    row 1              x x   x x                      its second label is -100: 9's first token is not predicted
    row 2                        x   x x x

Every token except a document's first is a label exactly once.
"""

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor
from torch.utils.data import Dataset

from .order import permutation
from .tokens import Corpus

IGNORED = -100  # label of positions without loss, as in torch and transformers
PADDING = -1  # document id of padding

Row = dict[str, Int64[Tensor, " time"]]


class DocumentStream:
    """Documents of a corpus, concatenated in a given order."""

    def __init__(self, corpus: Corpus, order: Int[np.ndarray, " documents"]):
        self.corpus, self.order = corpus, order
        self.ends = np.cumsum(np.diff(corpus.offsets)[order])

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.corpus.tokens)

    def read(self, start: int, stop: int) -> tuple[Int64[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
        """Return the tokens in [start, stop), and their documents."""
        places = np.arange(start, stop)
        turns = np.searchsorted(self.ends, places, side="right")
        documents = self.order[turns]
        before_end = self.ends[turns] - places
        tokens = self.corpus.tokens[self.corpus.offsets[documents + 1] - before_end]
        return tokens.astype(np.int64), documents  # the corpus's dtype may be unsigned, without -100

    def row(self, start: int, stop: int, length: int) -> Row:
        """Return the tokens in [start, stop) as inputs with labels, padded to `length`."""
        input_ids = np.full(length, self.corpus.pad_id, dtype=np.int64)
        shift_labels = np.full(length, IGNORED, dtype=np.int64)
        document_ids = np.full(length, PADDING, dtype=np.int64)
        if start < stop:
            tokens, documents = self.read(start, stop + 1)
            size = stop - start
            input_ids[:size], document_ids[:size] = tokens[:-1], documents[:-1]
            shift_labels[:size] = np.where(documents[1:] == documents[:-1], tokens[1:], IGNORED)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "shift_labels": torch.from_numpy(shift_labels),
            "document_ids": torch.from_numpy(document_ids),
        }


class PackedRows(Dataset[Row]):
    """Independent rows: a document that is cut at the end of a row continues in another row without its past.

    Documents are shuffled once and concatenated. The index counts over epochs, and every epoch has the same rows.

    Args:
        corpus: the documents.
        sequence_length: the number of tokens in a row.
        seed: seeds the order of documents.
        pad: pad the last, shorter row instead of dropping it.
        multiple_of: round the number of rows up to a multiple of this number with empty rows (with `pad` only).
    """

    def __init__(self, corpus: Corpus, sequence_length: int, *, seed: int = 0, pad: bool = False, multiple_of: int = 1):
        self.stream = DocumentStream(corpus, permutation(len(corpus), seed))
        self.sequence_length = sequence_length
        self.inputs = len(self.stream) - 1  # the last token has no next token
        rows = -(-self.inputs // sequence_length) if pad else self.inputs // sequence_length
        self.rows = -(-rows // multiple_of) * multiple_of if pad else rows

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return self.rows

    def __getitem__(self, index: int) -> Row:
        start = index % self.rows * self.sequence_length
        return self.stream.row(start, min(start + self.sequence_length, self.inputs), self.sequence_length)


class ContinuousRows(Dataset[Row]):
    """Continuous rows: the row `lanes` indices later continues a row, so that a state can be carried over.

    All documents, in an order that changes with the epoch, form one stream, which is cut into lanes of equal length.
    Index step · lanes + lane is the lane's step-th row, so a batch of `lanes` consecutive rows contains one row of
    every lane, in order. The index counts over epochs. Document ids are unique over epochs: the same id continues a
    document, and another id starts a new one.

    Args:
        corpus: the documents.
        sequence_length: the number of tokens in a row.
        lanes: the number of parallel rows, equal to the batch size over all ranks.
        seed: seeds the order of documents.
        reshuffle: change the order with every epoch.
        pad: pad each lane's last, shorter row instead of dropping it.
    """

    def __init__(
        self,
        corpus: Corpus,
        sequence_length: int,
        lanes: int,
        *,
        seed: int = 0,
        reshuffle: bool = True,
        pad: bool = False,
    ):
        self.corpus, self.sequence_length, self.lanes = corpus, sequence_length, lanes
        self.seed, self.reshuffle = seed, reshuffle
        self.inputs = len(corpus.tokens) - 1  # the last token has no next token
        if pad:
            self.lane_inputs = -(-self.inputs // lanes)
            self.steps = -(-self.lane_inputs // sequence_length)
        else:
            self.steps = self.inputs // lanes // sequence_length
            self.lane_inputs = self.steps * sequence_length
        self.epoch = -1
        self.stream: DocumentStream | None = None

    def __len__(self) -> int:
        """Return the number of rows in an epoch, over all lanes."""
        return self.steps * self.lanes

    def __getitem__(self, index: int) -> Row:
        epoch, row = divmod(index, len(self))
        step, lane = divmod(row, self.lanes)
        start = lane * self.lane_inputs + step * self.sequence_length
        stop = min(start + self.sequence_length, (lane + 1) * self.lane_inputs, self.inputs)
        item = self.stream_of(epoch).row(start, stop, self.sequence_length)
        item["document_ids"] += (item["document_ids"] != PADDING) * epoch * len(self.corpus)
        return item

    def stream_of(self, epoch: int) -> DocumentStream:
        """Return the documents in the order of an epoch."""
        if self.stream is None or epoch != self.epoch:
            order = permutation(len(self.corpus), self.seed, epoch if self.reshuffle else 0)
            self.epoch, self.stream = epoch, DocumentStream(self.corpus, order)
        return self.stream
