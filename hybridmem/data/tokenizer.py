"""Tokenizers: a byte tokenizer, any tokenizer of transformers, and the bytes of their tokens."""

import re
from collections.abc import Callable

import torch
from jaxtyping import Int
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"  # ids 256, 257, 258
NO_LIMIT = int(1e30)  # transformers' value for unlimited text length
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's notation of a byte


def byte_characters() -> str:
    """Return the 256 printable characters that represent bytes in GPT-2 and later byte-level tokenizers."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in kept else next(others)) for byte in range(256))


BYTE_VOCABULARY = {character: byte for byte, character in enumerate(byte_characters())}


def byte_tokenizer(model_max_length: int = NO_LIMIT) -> PreTrainedTokenizerFast:
    """Return a left-padding tokenizer with 259 ids: byte b has id b, followed by <|pad|>, <|bos|> and <|eos|>.

    AutoTokenizer can load the saved tokenizer without this package.
    """
    tokenizer = Tokenizer(models.BPE(vocab=BYTE_VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (PAD, BOS, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if every byte is its own id and no token is longer, so that tokenisation is trivial."""
    return tokenizer.vocab_size == 256 and tokenizer.get_vocab().items() >= BYTE_VOCABULARY.items()


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Return the byte tokenizer for "bytes", or load a tokenizer from a folder or the Hugging Face hub.

    Raises:
        ValueError: The tokenizer cannot be loaded.
    """
    if name_or_path == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load tokenizer={name_or_path!r} ({str(error).splitlines()[0]}); set it to 'bytes', a folder with "
            "a tokenizer, or the name of a model on the Hugging Face hub"
        ) from error


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id + 1, the number of rows that an embedding needs.

    `len(tokenizer)` counts tokens instead and is smaller if ids have gaps, from reserved ids or removed tokens.
    """
    return 1 + max([*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder], default=-1)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Return the bytes of every id, empty for special tokens and for ids without a token.

    Byte-level tokenizers represent each byte by a character. SentencePiece writes "▁" for a space and <0x0A> for a
    byte. For other tokenizers, the token's own text counts, without the white space that they drop.
    """
    pieces = [b""] * vocabulary_size(tokenizer)
    decode, added_tokens = _piece_decoder(tokenizer), tokenizer.added_tokens_decoder
    for piece, token in tokenizer.get_vocab().items():
        if token not in added_tokens:  # added tokens contain plain text
            pieces[token] = decode(piece)
    for token, added in added_tokens.items():
        pieces[token] = b"" if added.special else added.content.encode()
    for token in tokenizer.all_special_ids:
        pieces[token] = b""
    return pieces


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " vocab"]:
    """Return the number of UTF-8 bytes of each id, 0 for special tokens, the denominator of bits per byte.

    The sum over a text's tokens is the text's length, apart from characters that the tokenizer adds or drops
    (SentencePiece: a space before the text).
    """
    return torch.tensor([len(piece) for piece in token_bytes(tokenizer)])


def _piece_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "ByteLevel" in repr(backend.decoder):
        return _byte_level_piece
    if any("▁" in piece for piece in tokenizer.get_vocab()):
        return _sentencepiece_piece
    return str.encode


def _byte_level_piece(piece: str) -> bytes:
    return bytes(BYTE_VOCABULARY[character] for character in piece)


def _sentencepiece_piece(piece: str) -> bytes:
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
