"""Datasets of the Hugging Face hub, or of its loaders for local files, streamed rather than downloaded."""

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

# What `datasets` reads by format: without files it would look for some in all folders below the current one.
FORMATS = {"arrow", "csv", "json", "pandas", "parquet", "text", "webdataset", "xml"}


class HubDataModule(L.LightningDataModule):
    """Rows of tokens from a dataset that is read while training (`pip install hybridmem[data]`).

    Batches are those of TextDataModule in its packed mode. The first `val_documents` are held out, with every later
    copy of them. The training stream has no end: say how long to train with the trainer's `max_steps`, or how long
    an epoch is with its `limit_train_batches`. A resumed run goes on with the very batch that would have been
    next, given the same settings, processes and `num_workers`.

    After `setup`: `tokenizer`, `vocab_size` (its largest id + 1) and `token_byte_lengths`, the bytes of every id.

    Args:
        dataset: its name on the hub, or a format such as "json" or "parquet" with `data_files`.
        name: which configuration of the dataset.
        split: which part of it.
        data_files: files of the dataset to read, local or remote; several files let several workers read.
        revision: the version on the hub; give one to be able to repeat a run.
        text_column: the column that holds the text.
        tokenizer: "bytes", a folder with a tokenizer, or the name of a model on the hub.
        sequence_length: tokens of a training row.
        val_sequence_length: tokens of a validation row; as in training if not given.
        batch_size: training rows per process and step.
        val_batch_size: validation rows per process and step; as in training if not given.
        val_documents: how many documents to hold out.
        shuffle_documents: documents that are read, shuffled and cut into rows together; files are shuffled as well.
        num_workers: processes that read; at most as many as there are files for each training process.
        seed: of the order.

    Raises:
        ImportError, ValueError: in the constructor, in `setup` or before the first batch, naming what to change.
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
            raise ValueError(f"data_files must name files: dataset={dataset!r} is a format")
        self.save_hyperparameters(logger=False)
        self.val_sequence_length = val_sequence_length or sequence_length
        self.val_batch_size = val_batch_size or batch_size
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.resumed: dict[str, Any] = {}
        self.train_loader: StreamLoader | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open the stream and read what is held out."""
        if self.tokenizer is not None:
            return
        self.tokenizer = load_tokenizer(self.hparams.tokenizer)
        document_marks(self.tokenizer)
        self.vocab_size = vocabulary_size(self.tokenizer)
        self.token_byte_lengths = token_byte_lengths(self.tokenizer)
        self.documents = self.open_stream()
        self.held_out, self.val_corpus = self.hold_out()

    def open_stream(self) -> Any:
        """The dataset, streaming."""
        try:
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            raise ImportError("HubDataModule reads with `datasets`: pip install hybridmem[data]") from error
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
        except Exception as error:  # of whichever library reads the format
            raise ValueError(f"{self.source} cannot be opened: {type(error).__name__}: {error}") from error

    @property
    def source(self) -> str:
        """What errors call the dataset."""
        settings = self.hparams
        named = {"dataset": settings.dataset, "name": settings.name, "split": settings.split}
        named |= {"data_files": settings.data_files, "revision": settings.revision}
        return ", ".join(f"{name}={value!r}" for name, value in named.items() if value is not None)

    def hold_out(self) -> tuple[set[bytes], Corpus]:
        """Digests of the first documents, and their tokens."""
        records = list(islice(read_records(self.documents, self.source), self.hparams.val_documents))
        column = self.hparams.text_column
        if records and column not in records[0]:
            raise ValueError(f"text_column={column!r} is no column of {self.source}: it has {', '.join(records[0])}")
        texts = texts_of(records, column, self.source)
        if not texts:
            raise ValueError(
                f"text_column={column!r} holds no text in the first {len(records)} documents of {self.source}"
            )
        corpus = tokenize_texts(texts, self.tokenizer)
        rank_zero_info(f"val: {len(corpus):,} documents, {len(corpus.tokens):,} tokens")
        return {digest(text) for text in texts}, corpus

    def train_dataloader(self) -> StreamLoader:
        """Batches from where the run stands."""
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
        """All rows of the documents held out, the last one padded."""
        rank, processes = share_of(self.trainer)
        rows = PackedRows(self.val_corpus, self.val_sequence_length, pad=True, multiple_of=processes)
        sampler = EndlessSampler(len(rows), seed=None, rank=rank, world_size=processes)
        return ordered_loader(rows, sampler, self.val_batch_size)

    def predict_dataloader(self) -> ResumableLoader:
        """The validation rows."""
        return self.val_dataloader()

    def test_dataloader(self) -> list[ResumableLoader]:
        """The validation rows."""
        return [self.val_dataloader()]

    def train_stream(self) -> RowStream:
        """This process's share of the stream."""
        from datasets.distributed import split_dataset_by_node

        settings, (rank, processes) = self.hparams, share_of(self.trainer)
        documents = split_dataset_by_node(self.documents, rank, processes)
        whole_files = self.documents.num_shards % processes == 0  # else each process skips through all files
        files = self.documents.num_shards // (processes if whole_files else 1)
        if files < settings.num_workers:
            raise ValueError(
                f"num_workers={settings.num_workers} is more than the {files} file(s) that the dataset has for each "
                f"of {processes} process(es): set num_workers to at most {files}"
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
        """Refuse a run that would never come to the end of its first epoch."""
        trainer = self.trainer
        if trainer is None or trainer.max_epochs == -1 or trainer.max_steps != -1:
            return
        if isinstance(trainer.limit_train_batches, float):
            raise ValueError(
                "the training stream has no end: set the trainer's max_steps, or limit_train_batches to the number "
                "of batches in an epoch"
            )

    def resumed_places(self) -> list[Any] | None:
        """Where this process's workers begin after a resume."""
        if not self.resumed:
            return None
        (rank, processes), places = share_of(self.trainer), self.resumed["places"]
        before, now = (len(places), len(places[0])), (processes, max(1, self.hparams.num_workers))
        if before != now:
            raise ValueError(
                f"the checkpoint's run had {before[0]} process(es) that streamed in {before[1]} part(s) each, this one "
                f"has {now[0]} and {now[1]}: resume with as many devices and the same num_workers"
            )
        return places[rank]

    def state_dict(self) -> dict[str, Any]:
        """The places of all workers of all processes. Every process has to call it, as Lightning does."""
        if self.train_loader is None:
            return {}
        places: list[Any] = [self.train_loader.places()]
        _, processes = share_of(self.trainer)
        if processes > 1:
            mine, places = places[0], [None] * processes
            torch.distributed.all_gather_object(places, mine)
        return {"places": places}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint's run ended, if this one trains."""
        if is_training(self.trainer):
            self.resumed, self.train_loader = state, None
