import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from hybridmem.data import Document, byte_tokenizer, tokenize

from .helpers import byte_level_bpe, gapped_tokenizer, sentencepiece_bpe

BYTES = byte_tokenizer()


def documents(*contents: bytes) -> list[Document]:
    return [Document(f"document {index}", len(content), content) for index, content in enumerate(contents)]


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=6))
def test_any_bytes_stay_as_they_are(contents):
    corpus = tokenize(documents(*contents), BYTES)
    assert len(corpus) == len(contents)
    for index, content in enumerate(contents):
        assert corpus.document(index).tolist() == [257, *content, 258]
    assert corpus.text.tobytes() == np.frombuffer(b"".join(contents), np.uint8).astype(np.uint16).tobytes()
    assert corpus.tokens.dtype == np.uint16
    assert corpus.pad_id == 256


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=6))
def test_batched_tokenisation_equals_single_calls(texts):
    tokenizer = sentencepiece_bpe()
    corpus = tokenize(documents(*(text.encode() for text in texts)), tokenizer)
    for index, text in enumerate(texts):
        assert corpus.document(index).tolist() == [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]


def test_many_documents_keep_their_order():
    texts = [f"number {index}" for index in range(200)]
    corpus = tokenize(documents(*(text.encode() for text in texts)), byte_level_bpe())
    assert [byte_level_bpe().decode(corpus.document(index)[1:-1]) for index in range(200)] == texts


def test_a_single_special_token_starts_ends_and_pads():
    tokenizer = byte_level_bpe()
    corpus = tokenize(documents(b"def add"), tokenizer)
    end = tokenizer.eos_token_id
    assert corpus.tokens[[0, -1]].tolist() == [end, end]
    assert end not in corpus.text
    assert corpus.pad_id == end


@pytest.mark.parametrize("tokenizer", [BYTES, byte_level_bpe(), sentencepiece_bpe()])
def test_names_of_special_tokens_are_text(tokenizer):
    corpus = tokenize(documents(tokenizer.eos_token.encode()), tokenizer)
    assert not set(tokenizer.all_special_ids) & set(corpus.text.tolist())
    assert tokenizer.decode(corpus.text) == tokenizer.eos_token


@pytest.mark.parametrize(("gap", "dtype"), [(150, np.uint8), (250, np.uint16), (70_000, np.uint32)])
def test_the_type_holds_the_largest_id(gap, dtype):
    corpus = tokenize(documents(b"word1 word11", b"nowhere"), gapped_tokenizer(gap))
    end = gap + 50
    assert corpus.tokens.tolist() == [end, 1, gap + 2, end, end, gap + 3, end]
    assert corpus.tokens.dtype == dtype
    assert corpus.pad_id == end


def test_not_utf8():
    bad = documents(b"fine", b"b\xffd")
    with pytest.raises(ValueError, match=r"document 1 is not UTF-8 .* at byte 1.*set encoding_errors to 'replace'"):
        tokenize(bad, byte_level_bpe())
    assert byte_level_bpe().decode(tokenize(bad, byte_level_bpe(), "replace").document(1)[1:-1]) == "b\ufffdd"
    assert byte_level_bpe().decode(tokenize(bad, byte_level_bpe(), "ignore").document(1)[1:-1]) == "bd"
    assert tokenize(bad, BYTES).document(1).tolist() == [257, *b"b\xffd", 258]


def test_documents_need_a_mark_between_them():
    unmarked = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe().backend_tokenizer)
    with pytest.raises(ValueError, match="neither a bos nor an eos token"):
        tokenize(documents(b"x"), unmarked)
