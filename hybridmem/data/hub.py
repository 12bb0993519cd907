"""Streaming of datasets from the Hugging Face hub, or of files that its loaders read."""

from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from hybridmem.checks import MOST_ROWS, MOST_WORKERS, at_least

from .order import EndlessSampler, ResumableLoader, ordered_loader
from .packing import PackedRows
from .streaming import RowStream, StreamLoader, digest, read_records, texts_of, tokenize_texts
from .tokenizer import load_tokenizer, token_byte_lengths, vocabulary_size
from .tokens import Corpus, document_marks
from .trainer_state import batches_used, is_training, share_of

# Formats of `datasets`; without data_files it would search all folders below the current one.
FORMATS = {"arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "xml"}


class HubDataModule(L.LightningDataModule):
    """Rows of tokens from a dataset that is streamed during training (`pip install hybridmem[data]`).

    Batches have the format of TextDataModule's packed mode. The first `val_documents` and all later duplicates of them
    are held out. The training stream is endless: set the trainer's `max_steps`, or `limit_train_batches` for the length
    of an epoch. A resumed run continues with exactly the next batch, given equal settings, ranks and `num_workers`.

    `setup` sets `tokenizer`, `vocab_size` (the largest id + 1) and `token_byte_lengths` (the number of bytes per id).

    Args:
        dataset: a name on the hub, or a format such as "json" or "parquet" with `data_files`.
        name: the dataset's configuration.
        split: the dataset's split.
        data_files: files to read, local or remote; several files allow several workers.
        revision: the dataset's version on the hub; set it for reproducible runs.
        text_column: the column with the text.
        tokenizer: "bytes", a folder with a tokenizer, or the name of a model on the hub.
        sequence_length: the number of tokens in a training row.
        val_sequence_length: the number of tokens in a validation row; None takes sequence_length.
        batch_size: training rows per rank and step.
        val_batch_size: validation rows per rank and step; None takes batch_size.
        val_documents: the number of documents to hold out.
        shuffle_documents: the number of documents that are read, shuffled and packed together; files are shuffled too.
        num_workers: reader processes per rank, at most the number of files per rank.
        seed: seeds the order.

    Raises:
        ImportError, ValueError: A setting is invalid; raised by the constructor, by `setup` or before the first batch.
    """

    def __init__(
        self,
        dataset: str,
        name: str | None = None,
        split: str = "train",
        data_files: str | list[str] | None = None,
        revision: str | None = None,
        text_column: str = "text",
        tokenizer: str = "bytes",
        sequence_length: int = 1024,
        val_sequence_length: int | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        val_documents: int = 1000,
        shuffle_documents: int = 1000,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        at_least(1, sequence_length=sequence_length, val_sequence_length=val_sequence_length)
        at_least(1, MOST_ROWS, batch_size=batch_size, val_batch_size=val_batch_size)
        at_least(1, val_documents=val_documents, shuffle_documents=shuffle_documents)
        at_least(0, MOST_WORKERS, num_workers=num_workers)
        at_least(0, seed=seed)
        if dataset in FORMATS and data_files is None:
            raise ValueError(f"dataset={dataset!r} is a format and needs files; set data_files")
        self.save_hyperparameters(logger=False)
        self.val_sequence_length = val_sequence_length or sequence_length
        self.val_batch_size = val_batch_size or batch_size
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.resumed: dict[str, Any] = {}
        self.train_loader: StreamLoader | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the stream and read the held-out documents."""
        if self.tokenizer is not None:
            return
        self.tokenizer = load_tokenizer(self.hparams.tokenizer)
        document_marks(self.tokenizer)
        self.vocab_size = vocabulary_size(self.tokenizer)
        self.token_byte_lengths = token_byte_lengths(self.tokenizer)
        self.documents = self.open_stream()
        self.held_out, self.val_corpus = self.hold_out()

    def open_stream(self) -> Any:
        """Open the dataset in streaming mode."""
        try:
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            raise ImportError("HubDataModule needs datasets: pip install hybridmem[data]") from error
        settings = self.hparams
        try:
            return load_dataset(
                settings.dataset,
                settings.name,
                split=settings.split,
                data_files=settings.data_files,
                revision=settings.revision,
                streaming=True,
            )
        except Exception as error:  # depends on the library that reads the format
            raise ValueError(f"cannot open {self.source}: {type(error).__name__}: {error}") from error

    @property
    def source(self) -> str:
        """Return the dataset's name in error messages."""
        settings = self.hparams
        named = {"dataset": settings.dataset, "name": settings.name, "split": settings.split}
        named |= {"data_files": settings.data_files, "revision": settings.revision}
        return ", ".join(f"{name}={value!r}" for name, value in named.items() if value is not None)

    def hold_out(self) -> tuple[set[bytes], Corpus]:
        """Return the digests of the first documents, and their tokens."""
        records = list(islice(read_records(self.documents, self.source), self.hparams.val_documents))
        column = self.hparams.text_column
        if records and column not in records[0]:
            raise ValueError(
                f"text_column={column!r} is not a column of {self.source}; set it to one of {', '.join(records[0])}"
            )
        texts = texts_of(records, column, self.source)
        if not texts:
            raise ValueError(
                f"text_column={column!r} has no text in the first {len(records)} documents of {self.source}; set "
                "another text_column, or raise val_documents"
            )
        corpus = tokenize_texts(texts, self.tokenizer)
        rank_zero_info(f"val: {len(corpus):,} documents, {len(corpus.tokens):,} tokens")
        return {digest(text) for text in texts}, corpus

    def train_dataloader(self) -> StreamLoader:
        """Return the training batches from the run's current position on."""
        if self.train_loader is None:
            self.check_length()
            self.train_loader = StreamLoader(
                self.train_stream(),
                self.hparams.batch_size,
                num_workers=self.hparams.num_workers,
                position=lambda: batches_used(self),
                places=self.resumed_places(),
            )
        return self.train_loader

    def val_dataloader(self) -> ResumableLoader:
        """Return all rows of the held-out documents; the last row is padded."""
        rank, processes = share_of(self.trainer)
        rows = PackedRows(self.val_corpus, self.val_sequence_length, pad=True, multiple_of=processes)
        sampler = EndlessSampler(len(rows), seed=None, rank=rank, world_size=processes)
        return ordered_loader(rows, sampler, self.val_batch_size)

    def predict_dataloader(self) -> ResumableLoader:
        """Return the validation rows."""
        return self.val_dataloader()

    def test_dataloader(self) -> list[ResumableLoader]:
        """Return the validation rows."""
        return [self.val_dataloader()]

    def train_stream(self) -> RowStream:
        """Return this rank's share of the stream."""
        from datasets.distributed import split_dataset_by_node

        settings, (rank, processes) = self.hparams, share_of(self.trainer)
        documents = split_dataset_by_node(self.documents, rank, processes)
        whole_files = self.documents.num_shards % processes == 0  # otherwise each rank skips through all files
        files = self.documents.num_shards // (processes if whole_files else 1)
        if files < settings.num_workers:
            raise ValueError(
                f"num_workers={settings.num_workers} exceeds the {files} file(s) per process on {processes} "
                f"process(es); set num_workers to at most {files}"
            )
        return RowStream(
            documents,
            text_column=settings.text_column,
            held_out=self.held_out,
            tokenizer=self.tokenizer,
            sequence_length=settings.sequence_length,
            block_size=settings.shuffle_documents,
            seed=settings.seed,
            source=self.source,
        )

    def check_length(self) -> None:
        """Raise a ValueError if the first epoch would never end."""
        trainer = self.trainer
        if trainer is None or trainer.max_epochs == -1 or trainer.max_steps != -1:
            return
        if isinstance(trainer.limit_train_batches, float):
            raise ValueError(
                "the training stream is endless: set the trainer's max_steps, or limit_train_batches to the number of "
                "batches in an epoch"
            )

    def resumed_places(self) -> list[Any] | None:
        """Return the positions of this rank's workers after a resume."""
        if not self.resumed:
            return None
        (rank, processes), places = share_of(self.trainer), self.resumed["places"]
        before, now = (len(places), len(places[0])), (processes, max(1, self.hparams.num_workers))
        if before != now:
            raise ValueError(
                f"the checkpoint was saved with {before[0]} process(es) of {before[1]} stream(s) each, but this run "
                f"has {now[0]} of {now[1]}; resume with the checkpoint's number of devices and num_workers"
            )
        return places[rank]

    def state_dict(self) -> dict[str, Any]:
        """Return the positions of all workers; a collective call that every rank must make, as Lightning does."""
        if self.train_loader is None:
            return {}
        places: list[Any] = [self.train_loader.places()]
        _, processes = share_of(self.trainer)
        if processes > 1:
            mine, places = places[0], [None] * processes
            torch.distributed.all_gather_object(places, mine)
        return {"places": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the checkpoint's position if this run trains."""
        if is_training(self.trainer):
            self.resumed, self.train_loader = state, None
