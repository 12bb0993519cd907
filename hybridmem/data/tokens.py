"""Corpora as one array of tokens."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64, Integer
from transformers import PreTrainedTokenizerBase

from .corpora import Document
from .tokenizer import is_byte_tokenizer, vocabulary_size

DOCUMENTS_AT_ONCE = 64  # enough for fast tokenizers to use all cores, few enough for memory


@dataclass(frozen=True)
class Corpus:
    """Tokens of all documents, in the smallest sufficient dtype.

    Every document starts with the tokenizer's BOS and ends with its EOS. If the tokenizer has only one of them, it
    serves as both.

    Args:
        tokens: the concatenated tokens of all documents.
        offsets: the start of each document, and the end of the last one.
        pad_id: the padding token; only document id -1 identifies padding.
    """

    tokens: Integer[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " documents_plus_1"]
    pad_id: int

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> Integer[np.ndarray, " tokens"]:
        """Return the tokens of one document, BOS and EOS included."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def fingerprint(self) -> str:
        """Return a short hash of the tokens and document boundaries."""
        digest = hashlib.blake2b(self.tokens.data, digest_size=8)
        digest.update(self.offsets.data)
        return digest.hexdigest()

    @property
    def text(self) -> Integer[np.ndarray, " tokens"]:
        """Return the tokens of all documents without BOS and EOS."""
        inside = np.ones(len(self.tokens), dtype=bool)
        inside[self.offsets[:-1]] = inside[self.offsets[1:] - 1] = False
        return self.tokens[inside]


def tokenize(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, encoding_errors: str = "strict"
) -> Corpus:
    """Read and tokenise documents; the byte tokenizer takes arbitrary bytes, other tokenizers need UTF-8.

    Special tokens in a text are treated as plain text. `encoding_errors` handles invalid UTF-8: "strict" raises,
    "replace" substitutes and "ignore" drops it.

    Raises:
        ValueError: A document is not UTF-8, or the tokenizer has neither BOS nor EOS.
    """
    first, last = document_marks(tokenizer)
    dtype = np.min_scalar_type(vocabulary_size(tokenizer) - 1)
    pieces = []
    for tokens in _token_arrays(documents, tokenizer, encoding_errors, dtype):
        pieces.append(np.concatenate([np.array([first], dtype), tokens, np.array([last], dtype)]))
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else last
    return Corpus(np.concatenate(pieces), offsets, pad_id)


def document_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the tokens that start and end a document.

    Raises:
        ValueError: The tokenizer has neither BOS nor EOS.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has neither a bos nor an eos token to separate documents; set its "
            "eos_token, save it, and set tokenizer to the saved folder"
        )
    return (eos if bos is None else bos), (bos if eos is None else eos)


def _token_arrays(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, encoding_errors: str, dtype: np.dtype
) -> Iterator[Integer[np.ndarray, " tokens"]]:
    if is_byte_tokenizer(tokenizer):
        for document in documents:
            yield np.frombuffer(document.read(), np.uint8).astype(dtype)
        return
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        texts = [_decode(document, encoding_errors) for document in documents[start : start + DOCUMENTS_AT_ONCE]]
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # packing splits texts that exceed the model's limit
        )
        for ids in encoded["input_ids"]:
            yield np.array(ids, dtype)


def _decode(document: Document, encoding_errors: str) -> str:
    try:
        return document.read().decode("utf-8", encoding_errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{document.name} is not UTF-8 ({error.reason} at byte {error.start}); set encoding_errors to 'replace' "
            "or 'ignore', or tokenizer to 'bytes', which accepts any file"
        ) from error
