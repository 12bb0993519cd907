"""Text from files as a LightningDataModule."""

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

    Batches are dicts of input_ids, shift_labels and document_ids, each (batch, time); see `packing`. Training is
    an endless sequence of rows that `seed` fixes: a run that is resumed goes on with the very row that would have
    been next, wherever it stopped. Several processes share each batch, with `batch_size` rows each, and each reads
    the text for itself; Lightning need not be told (`use_distributed_sampler` makes no difference).

    After `setup`: `tokenizer`, `vocab_size` (its largest id + 1) and `token_byte_lengths`, the bytes of every id.

    Args:
        path: files and folders to read; without one, the standard library of the running Python (about 30 MB).
        val_path: files and folders to validate on; what is in `path` as well is not trained on. Without one,
            `val_fraction` of the files is held out.
        tokenizer: "bytes", a folder with a tokenizer, or the name of a model on the Hugging Face hub.
        text_column: the column of .jsonl files that holds the text; each line is a document.
        pattern: which files of a folder to read, such as "*.txt" or "*.jsonl.gz"; hidden ones are left out.
        sequence_length: tokens of a training row.
        val_sequence_length: tokens of a validation row; as in training if not given.
        batch_size: training rows per process and step.
        val_batch_size: validation rows per process and step; as in training if not given.
        mode: "packed" rows stand alone and come in random order; with "continuous" ones each row of a batch goes on
            where the same row of the batch before ended, so that a state can be carried along.
        val_fraction: share of the files to hold out, if there is no `val_path`.
        split_seed: which files are held out, and which ones a limit takes. It is apart from `seed` so that runs with
            several seeds have the same validation data.
        max_bytes: at most so many bytes of training documents, for quick runs.
        max_val_bytes: at most so many bytes of validation documents.
        encoding_errors: what to do about files that are not UTF-8, unless the tokenizer is "bytes": "strict" stops.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        seed: of the order of documents and rows.
        needle_lengths: for testing, lengths in tokens at which to look for needles in a haystack.
        needle_keys: needles in a haystack, of which one is asked for.
        num_needles: haystacks of each length.

    Raises:
        ValueError, FileNotFoundError: in the constructor or in `setup`, naming the setting to change.
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
            raise ValueError(f"needle_lengths={needle_lengths} names a length twice: name each once")
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
        self.corpora: dict[str, Corpus] = {}  # "train" and "val", once they are needed
        self.resumed: dict[str, Any] = {"rows": 0, "batches": 0}

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what the stage needs and is not there yet."""
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
                self.train_rows()  # too little text is found now rather than when training starts

    def find_documents(self) -> dict[str, list[Document]]:
        """The documents to train on and those to validate on."""
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
                raise ValueError(f"val_path={settings.val_path} holds all documents of path={settings.path}")
        return {
            "train": limit_bytes(train, settings.max_bytes, settings.split_seed, "max_bytes"),
            "val": limit_bytes(val, settings.max_val_bytes, settings.split_seed, "max_val_bytes"),
        }

    def read(self, split: str, documents: list[Document]) -> Corpus:
        """Tokenise documents, and say how much there is."""
        corpus = tokenize(documents, self.tokenizer, self.hparams.encoding_errors)
        size = sum(document.size for document in documents)
        rank_zero_info(f"{split}: {len(corpus):,} documents, {size:,} bytes, {len(corpus.tokens):,} tokens")
        return corpus

    def train_dataloader(self) -> ResumableLoader:
        """The endless sequence of training rows from where the run stands, an epoch's worth of it.

        With gradient accumulation an epoch takes a few rows of the next one, to end with an optimiser step.
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
        """All validation rows, what is left of the last ones padded."""
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
        """The validation rows."""
        return self.val_dataloader()

    def test_dataloader(self) -> list[ResumableLoader]:
        """The validation rows; then, for each of `needle_lengths`, haystacks with needles."""
        return [self.val_dataloader(), *map(self.needle_dataloader, self.hparams.needle_lengths or [])]

    def needle_dataloader(self, length: int) -> ResumableLoader:
        """Haystacks of `length` tokens, in batches of about as many tokens as validation has."""
        settings, (_, processes) = self.hparams, share_of(self.trainer)
        if settings.num_needles % processes:
            raise ValueError(
                f"num_needles={settings.num_needles} cannot be shared evenly by {processes} processes: set a "
                "multiple, or test on one device"
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
        """The rows of a training epoch."""
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
                f"rows of sequence_length={settings.sequence_length} on {processes} process(es): lower one of "
                "them, or give more text"
            )
        return rows

    def sampler(
        self,
        rows: PackedRows | ContinuousRows | NeedleRows,
        seed: int | None = None,
        position: Callable[[], int] = start_of_data,
        num_samples: int | None = None,
    ) -> EndlessSampler:
        """This process's share of the rows."""
        rank, processes = share_of(self.trainer)
        return EndlessSampler(
            len(rows), seed=seed, position=position, rank=rank, world_size=processes, num_samples=num_samples
        )

    def rows_read(self) -> int:
        """How many rows of the endless sequence training has used, over all processes."""
        _, processes = share_of(self.trainer)
        batches = batches_used(self) - self.resumed["batches"]
        return self.resumed["rows"] + batches * self.hparams.batch_size * processes

    def sequence(self, rows: PackedRows | ContinuousRows) -> dict[str, int | str]:
        """What the sequence of training rows follows from."""
        lanes = rows.lanes if isinstance(rows, ContinuousRows) else 1
        return {
            "mode": self.hparams.mode,
            "seed": self.hparams.seed,
            "rows": len(rows),
            "lanes": lanes,
            "text": self.corpora["train"].fingerprint,
        }

    def check_sequence(self, rows: PackedRows | ContinuousRows) -> None:
        """Refuse to go on in another sequence than the checkpoint's."""
        before, now = self.resumed.get("sequence", {}), self.sequence(rows)
        if any(now[name] != value for name, value in before.items()):
            raise ValueError(
                f"the checkpoint's training rows were {before}, those of this run are {now}: resume with the data "
                f"settings and the files of the checkpoint (path={self.hparams.path}), or start a new run from its "
                "weights"
            )

    def state_dict(self) -> dict[str, Any]:
        """How much of which sequence was used. Packed rows go on with another batch size or number of processes."""
        if "train" not in self.corpora:
            return {}
        return {
            "rows": self.rows_read(),
            "batches": batches_used(self),
            "sequence": self.sequence(self.train_rows()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the checkpoint's run ended, if this one trains."""
        if is_training(self.trainer):
            self.resumed = state
