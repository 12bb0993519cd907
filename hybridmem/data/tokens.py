"""A corpus as one long array of tokens."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64, Integer
from transformers import PreTrainedTokenizerBase

from .corpora import Document
from .tokenizer import is_byte_tokenizer, vocabulary_size

DOCUMENTS_AT_ONCE = 64  # enough for a fast tokenizer to use every core, few enough for memory


@dataclass(frozen=True)
class Corpus:
    """The tokens of all documents, in the smallest type that holds them.

    Every document begins with the tokenizer's bos and ends with its eos; where it has one of them only, that one
    does both.

    Args:
        tokens: of all documents, one after another.
        offsets: where each document begins, and where the last one ends.
        pad_id: what stands where there is no token; document id -1 is what marks such places.
    """

    tokens: Integer[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " documents_plus_1"]
    pad_id: int

    def __len__(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> Integer[np.ndarray, " tokens"]:
        """The tokens of one document, its first and last marks with them."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @cached_property
    def fingerprint(self) -> str:
        """A short text that differs where tokens or documents do."""
        digest = hashlib.blake2b(self.tokens.data, digest_size=8)
        digest.update(self.offsets.data)
        return digest.hexdigest()

    @property
    def text(self) -> Integer[np.ndarray, " tokens"]:
        """The tokens of all documents without the marks between them."""
        inside = np.ones(len(self.tokens), dtype=bool)
        inside[self.offsets[:-1]] = inside[self.offsets[1:] - 1] = False
        return self.tokens[inside]


def tokenize(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, encoding_errors: str = "strict"
) -> Corpus:
    """Read and tokenise documents. The byte tokenizer takes bytes as they are, others take UTF-8.

    Names of special tokens in a text are text. `encoding_errors` is what to do about bytes that are not UTF-8:
    "strict", "replace" or "ignore".

    Raises:
        ValueError: a document is not UTF-8, or the tokenizer has neither bos nor eos.
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
    """The tokens that begin and end a document.

    Raises:
        ValueError: the tokenizer has none.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None and eos is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has neither a bos nor an eos token to keep documents apart: "
            "set its eos_token, save it, and set tokenizer to the saved folder"
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
            verbose=False,  # a text longer than the model's limit is cut into rows later
        )
        for ids in encoded["input_ids"]:
            yield np.array(ids, dtype)


def _decode(document: Document, encoding_errors: str) -> str:
    try:
        return document.read().decode("utf-8", encoding_errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{document.name} is not UTF-8 ({error.reason} at byte {error.start}): set encoding_errors to 'replace' "
            "or 'ignore', or tokenizer to 'bytes', which takes any file"
        ) from error
