"""Small corpora and tokenizers, and a Lightning module that records its batches."""

import json
from functools import cache
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hybridmem.data import Corpus

# What Lightning 2.6 says about torch 2.13, its advice on checkpoints that tests resume in their own way, and what
# Python from 3.12 on says about a DataLoader's workers.
LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "`isinstance.treespec, LeafSpec.` is deprecated",
        "The '.*_dataloader' does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "Be aware that when using `ckpt_path`, callbacks",
        ".*fit.ckpt_path=.* was called without a model",
        ".*ckpt_path=.* is set, but there is no last checkpoint available",
        "The dirpath has changed from",
        "This process .* is multi-threaded, use of fork",
    )
]

SAMPLE = "def add(a, b):\n    return a + b  # naïve\n\n\nprint('日本語 é 🙂', add(1, 2))\n\tx = 12345\n" * 3


def numbered_corpus(lengths: list[int], pad_id: int = 0) -> Corpus:
    """Return documents of these lengths with distinct tokens, counted from 1000."""
    tokens = np.arange(1000, 1000 + sum(lengths), dtype=np.uint16)
    return Corpus(tokens, np.cumsum([0, *lengths]), pad_id)


def write_files(folder: Path, count: int = 12, size: int = 300, suffix: str = ".py") -> Path:
    """Write text files of different lengths; each line contains its file's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        lines = [f"file_{index:03d} = {line}\n" for line in range(size // 20 + index)]
        (folder / f"file_{index:03d}{suffix}").write_text("".join(lines))
    return folder


def write_jsonl(file: Path, texts: list[str], column: str = "text") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({column: text, "number": index}) + "\n" for index, text in enumerate(texts)))
    return file


@cache
def byte_level_bpe() -> PreTrainedTokenizerFast:
    """Return a tokenizer like GPT-2's, with one token for both BOS and EOS and no padding token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@cache
def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama 2's, with "▁" for spaces and byte fallback."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "d", "e", "f", "de", "def", "▁def", "a", "▁a", "r", "t", "▁▁"]
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>", *bytes_, *words])}
    merges = [("d", "e"), ("de", "f"), ("▁", "def"), ("▁", "a"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def gapped_tokenizer(gap: int = 70_000) -> PreTrainedTokenizerFast:
    """Return a tokenizer of 14 tokens with gaps in its ids from 9 to `gap` and between `gap` + 3 and EOS."""
    ids = {f"word{n}": n if n < 9 else gap + n - 9 for n in range(12)} | {"<unk>": gap + 3, "</s>": gap + 50}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


class Recorder(L.LightningModule):
    """Recorder of every training batch's input_ids; `fails_at` raises before a batch is complete."""

    def __init__(self, fails_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fails_at = fails_at
        self.seen: list[list] = []
        self.validated: list[list] = []

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        if len(self.seen) == self.fails_at:
            raise RuntimeError("failed on purpose")
        assert set(batch) == {"input_ids", "shift_labels", "document_ids"}
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.validated.append(batch["input_ids"].tolist())
        self.log("val", 0.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **options) -> L.Trainer:
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    return L.Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **{"max_epochs": -1, **quiet, **options})
