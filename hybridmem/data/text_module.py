"""LightningDataModule of text from files."""

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from hybridmem.checks import MOST_ROWS, MOST_WORKERS, at_least, between_0_and_1, one_of
from hybridmem.tasks.needle import NeedleRows

from .corpora import Document, limit_bytes, list_documents, split_documents
from .order import EndlessSampler, ResumableLoader, ordered_loader, start_of_data, whole_steps
from .packing import ContinuousRows, PackedRows
from .tokenizer import load_tokenizer, token_byte_lengths, vocabulary_size
from .tokens import Corpus, document_marks, tokenize
from .trainer_state import batches_of_steps, batches_used, is_training, share_of


class TextDataModule(L.LightningDataModule):
    """Rows of tokens from text files, for training, validation and testing.

    Batches are dicts of input_ids, shift_labels and document_ids, each (batch, time); see `packing`. Training is an
    endless sequence of rows that depends on `seed`, and a resumed run continues with exactly the next row. Several
    ranks share each step, with `batch_size` rows each; every rank reads the text itself, and Lightning's
    `use_distributed_sampler` has no effect.

    `setup` sets `tokenizer`, `vocab_size` (the largest id + 1) and `token_byte_lengths` (the number of bytes per id).

    Args:
        path: files and folders to read; None reads the standard library of the running Python (about 30 MB).
        val_path: files and folders for validation, which are removed from the training data. None holds out
            `val_fraction` of the files.
        tokenizer: "bytes", a folder with a tokenizer, or the name of a model on the Hugging Face hub.
        text_column: the column of .jsonl files with the text; each line is a document.
        pattern: glob pattern of the files to read, such as "*.txt" or "*.jsonl.gz"; hidden files are skipped.
        sequence_length: the number of tokens in a training row.
        val_sequence_length: the number of tokens in a validation row; None takes sequence_length.
        batch_size: training rows per rank and step.
        val_batch_size: validation rows per rank and step; None takes batch_size.
        mode: "packed" gives independent rows in random order; "continuous" makes each row of a batch continue the same
            row of the previous batch, so that a state can be carried over.
        val_fraction: the fraction of documents to hold out without `val_path`, but at least one.
        split_seed: seeds the choice of held-out files and of documents under a byte limit. It is separate from `seed`,
            so that runs with different seeds share their validation data.
        max_bytes: the maximum size of all training documents, for quick runs.
        max_val_bytes: the maximum size of all validation documents.
        encoding_errors: treatment of invalid UTF-8, unless the tokenizer is "bytes": "strict" raises.
        num_workers: the number of processes that prepare batches; 0 prepares them in the training process.
        seed: seeds the order of documents and rows.
        needle_lengths: lengths in tokens of the needle-in-a-haystack tests.
        needle_keys: the number of needles in a haystack; the question asks for one.
        num_needles: the number of haystacks per length.

    Raises:
        ValueError, FileNotFoundError: A setting is invalid; raised by the constructor or by `setup`.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        tokenizer: str = "bytes",
        text_column: str = "text",
        pattern: str = "*.py",
        sequence_length: int = 1024,
        val_sequence_length: int | None = None,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        mode: Literal["packed", "continuous"] = "packed",
        val_fraction: float = 0.05,
        split_seed: int = 0,
        max_bytes: int | None = None,
        max_val_bytes: int | None = None,
        encoding_errors: Literal["strict", "replace", "ignore"] = "strict",
        num_workers: int = 0,
        seed: int = 0,
        needle_lengths: list[int] | None = None,
        needle_keys: int = 1,
        num_needles: int = 20,
    ):
        super().__init__()
        at_least(1, sequence_length=sequence_length, val_sequence_length=val_sequence_length)
        at_least(1, MOST_ROWS, batch_size=batch_size, val_batch_size=val_batch_size)
        if len(set(needle_lengths or ())) < len(needle_lengths or ()):
            raise ValueError(f"needle_lengths={needle_lengths} contains a length twice; remove the duplicate")
        at_least(1, needle_lengths=min(needle_lengths or [1]), needle_keys=needle_keys, num_needles=num_needles)
        at_least(0, MOST_WORKERS, num_workers=num_workers)
        at_least(0, seed=seed, split_seed=split_seed)
        one_of(("packed", "continuous"), mode=mode)
        one_of(("strict", "replace", "ignore"), encoding_errors=encoding_errors)
        between_0_and_1(val_fraction=val_fraction)
        self.save_hyperparameters(logger=False)
        self.val_sequence_length = val_sequence_length or sequence_length
        self.val_batch_size = val_batch_size or batch_size
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.corpora: dict[str, Corpus] = {}  # "train" and "val", filled on demand
        self.resumed: dict[str, Any] = {"rows": 0, "batches": 0}

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise the data that the stage needs."""
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.hparams.tokenizer)
            document_marks(self.tokenizer)
            self.vocab_size = vocabulary_size(self.tokenizer)
            self.token_byte_lengths = token_byte_lengths(self.tokenizer)
        wanted = {"train", "val"} if stage in (None, "fit") else {"val"}
        missing = wanted - self.corpora.keys()
        if missing:
            documents = self.find_documents()
            self.corpora |= {split: self.read(split, documents[split]) for split in sorted(missing)}
            if "train" in missing:
                self.train_rows()  # raises early if there is too little text

    def find_documents(self) -> dict[str, list[Document]]:
        """Return the training and validation documents."""
        settings = self.hparams
        options = {"pattern": settings.pattern, "text_column": settings.text_column}
        documents = list_documents(settings.path, **options)
        if settings.val_path is None:
            train, val = split_documents(documents, settings.val_fraction, settings.split_seed)
        else:
            val = list_documents(settings.val_path, setting="val_path", **options)
            held_out = {document.name for document in val}
            train = [document for document in documents if document.name not in held_out]
            if not train:
                raise ValueError(
                    f"val_path={settings.val_path} contains all documents of path={settings.path}; set path to other "
                    "documents"
                )
        return {
            "train": limit_bytes(train, settings.max_bytes, settings.split_seed, "max_bytes"),
            "val": limit_bytes(val, settings.max_val_bytes, settings.split_seed, "max_val_bytes"),
        }

    def read(self, split: str, documents: list[Document]) -> Corpus:
        """Tokenise documents, and log their number and size."""
        corpus = tokenize(documents, self.tokenizer, self.hparams.encoding_errors)
        size = sum(document.size for document in documents)
        rank_zero_info(f"{split}: {len(corpus):,} documents, {size:,} bytes, {len(corpus.tokens):,} tokens")
        return corpus

    def train_dataloader(self) -> ResumableLoader:
        """Return an epoch's worth of the endless sequence of training rows, from the run's current position on.

        With gradient accumulation, an epoch borrows a few rows from the next one, so that it ends with an optimiser
        step.
        """
        rows, (_, processes) = self.train_rows(), share_of(self.trainer)
        self.check_sequence(rows)
        sampler = self.sampler(
            rows,
            seed=self.hparams.seed if isinstance(rows, PackedRows) else None,
            position=self.rows_read,
            num_samples=whole_steps(len(rows), self.hparams.batch_size, processes, batches_of_steps(self.trainer)),
        )
        return ordered_loader(
            rows, sampler, self.hparams.batch_size, num_workers=self.hparams.num_workers, drop_last=True
        )

    def val_dataloader(self) -> ResumableLoader:
        """Return all validation rows; the last rows are padded."""
        corpus, length, seed = self.corpora["val"], self.val_sequence_length, self.hparams.split_seed
        _, processes = share_of(self.trainer)
        rows: PackedRows | ContinuousRows
        if self.hparams.mode == "packed":
            rows = PackedRows(corpus, length, seed=seed, pad=True, multiple_of=processes)
        else:
            lanes = self.val_batch_size * processes
            rows = ContinuousRows(corpus, length, lanes, seed=seed, reshuffle=False, pad=True)
        return ordered_loader(rows, self.sampler(rows), self.val_batch_size, num_workers=self.hparams.num_workers)

    def predict_dataloader(self) -> ResumableLoader:
        """Return the validation rows."""
        return self.val_dataloader()

    def test_dataloader(self) -> list[ResumableLoader]:
        """Return the validation rows, then the haystacks of each length in `needle_lengths`."""
        return [self.val_dataloader(), *map(self.needle_dataloader, self.hparams.needle_lengths or [])]

    def needle_dataloader(self, length: int) -> ResumableLoader:
        """Return haystacks of `length` tokens, with about the same number of tokens per batch as validation."""
        settings, (_, processes) = self.hparams, share_of(self.trainer)
        if settings.num_needles % processes:
            raise ValueError(
                f"num_needles={settings.num_needles} is not divisible by {processes} processes; set it to a multiple, "
                "or test on one device"
            )
        rows = NeedleRows(
            self.corpora["val"].text,
            self.tokenizer,
            length,
            num_keys=settings.needle_keys,
            num_rows=settings.num_needles,
            seed=settings.split_seed,
        )
        batch_size = max(1, self.val_batch_size * self.val_sequence_length // length)
        return ordered_loader(rows, self.sampler(rows), batch_size, num_workers=settings.num_workers)

    def train_rows(self) -> PackedRows | ContinuousRows:
        """Return the rows of a training epoch."""
        settings, corpus, (_, processes) = self.hparams, self.corpora["train"], share_of(self.trainer)
        lanes = settings.batch_size * processes
        rows: PackedRows | ContinuousRows
        if settings.mode == "packed":
            rows = PackedRows(corpus, settings.sequence_length, seed=settings.seed)
        else:
            rows = ContinuousRows(corpus, settings.sequence_length, lanes, seed=settings.seed)
        if len(rows) < lanes:
            raise ValueError(
                f"{len(corpus.tokens)} training tokens do not fill one batch of batch_size={settings.batch_size} "
                f"rows of sequence_length={settings.sequence_length} on {processes} process(es); lower one of them, or "
                "set path to more text"
            )
        return rows

    def sampler(
        self,
        rows: PackedRows | ContinuousRows | NeedleRows,
        seed: int | None = None,
        position: Callable[[], int] = start_of_data,
        num_samples: int | None = None,
    ) -> EndlessSampler:
        """Return the sampler of this rank's share of the rows."""
        rank, processes = share_of(self.trainer)
        return EndlessSampler(
            len(rows), seed=seed, position=position, rank=rank, world_size=processes, num_samples=num_samples
        )

    def rows_read(self) -> int:
        """Return the number of rows of the endless sequence that training has used on all ranks."""
        _, processes = share_of(self.trainer)
        batches = batches_used(self) - self.resumed["batches"]
        return self.resumed["rows"] + batches * self.hparams.batch_size * processes

    def sequence(self, rows: PackedRows | ContinuousRows) -> dict[str, int | str]:
        """Return the settings that determine the sequence of training rows."""
        lanes = rows.lanes if isinstance(rows, ContinuousRows) else 1
        return {
            "mode": self.hparams.mode,
            "seed": self.hparams.seed,
            "rows": len(rows),
            "lanes": lanes,
            "text": self.corpora["train"].fingerprint,
        }

    def check_sequence(self, rows: PackedRows | ContinuousRows) -> None:
        """Raise a ValueError if the sequence differs from the checkpoint's."""
        before, now = self.resumed.get("sequence", {}), self.sequence(rows)
        if any(now[name] != value for name, value in before.items()):
            raise ValueError(
                f"the checkpoint has the training rows {before}, but this run has {now}; resume with the checkpoint's "
                f"data settings and files (path={self.hparams.path}), or start a new run from its weights"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the sequence and the position in it; with packed rows, batch size and number of ranks may change."""
        if "train" not in self.corpora:
            return {}
        return {
            "rows": self.rows_read(),
            "batches": batches_used(self),
            "sequence": self.sequence(self.train_rows()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the checkpoint's position if this run trains."""
        if is_training(self.trainer):
            self.resumed = state
