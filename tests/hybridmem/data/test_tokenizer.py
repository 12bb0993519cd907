from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hybridmem.data import byte_tokenizer, load_tokenizer, token_byte_lengths
from hybridmem.data.tokenizer import vocabulary_size

from .helpers import SAMPLE, byte_level_bpe, gapped_tokenizer, sentencepiece_bpe

BYTES = byte_tokenizer()
ODD = ["", " lead", "a  b\n\t", "日本語 é 🙂", "\x00\x01\x7f\x80\xff", "e\u0301 \u200b\ufeff", "<|eos|"]


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@given(st.text())
def test_ids_are_the_bytes_and_go_back(text):
    assert ids(BYTES, text) == list(text.encode())
    assert BYTES.decode(ids(BYTES, text)) == text


def test_layout():
    assert len(BYTES) == 259
    assert (BYTES.pad_token_id, BYTES.bos_token_id, BYTES.eos_token_id) == (256, 257, 258)
    assert BYTES.padding_side == "left"
    assert BYTES("<|eos|>")["input_ids"] == [258]
    assert byte_tokenizer(model_max_length=77).model_max_length == 77


def test_reload_with_auto_tokenizer(tmp_path):
    BYTES.save_pretrained(tmp_path)
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert tokenizer.get_vocab() == BYTES.get_vocab()
        assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("left", 256, 258)
        for text in ODD:
            assert ids(tokenizer, text) == list(text.encode())
            assert tokenizer.decode(ids(tokenizer, text)) == text


def test_load_by_name(tmp_path):
    assert len(load_tokenizer("bytes")) == 259
    with pytest.raises(ValueError, match=r"cannot load tokenizer='.*/nothing' .*; set it to 'bytes', a folder"):
        load_tokenizer(str(tmp_path / "nothing"))


def test_byte_lengths_of_bytes():
    lengths = token_byte_lengths(BYTES)
    assert lengths.tolist() == [1] * 256 + [0] * 3
    assert lengths.dtype == torch.int64


@given(st.text(max_size=200))
def test_byte_lengths_of_byte_level_tokens_sum_to_the_text(text):
    tokenizer = byte_level_bpe()
    assert token_byte_lengths(tokenizer)[ids(tokenizer, text)].sum() == len(text.encode())


@given(st.text(alphabet=st.characters(exclude_characters="▁"), min_size=1, max_size=200))
def test_byte_lengths_of_sentencepiece_tokens_sum_to_the_text_after_a_space(text):
    tokenizer = sentencepiece_bpe()
    assert token_byte_lengths(tokenizer)[ids(tokenizer, text)].sum() == 1 + len(text.encode())


def test_byte_lengths_of_special_and_added_tokens():
    tokenizer = deepcopy(byte_level_bpe())
    tokenizer.add_tokens(["naïve"])
    lengths = token_byte_lengths(tokenizer)
    assert len(lengths) == len(tokenizer)
    assert lengths[tokenizer.convert_tokens_to_ids("naïve")] == 6
    assert lengths[tokenizer.eos_token_id] == 0
    assert lengths[ids(tokenizer, SAMPLE)].sum() == len(SAMPLE.encode())


@pytest.mark.parametrize("text", ["日本語", "two words", "end▁of▁text"])
def test_added_tokens_are_text_not_characters_for_bytes(text):
    tokenizer = deepcopy(byte_level_bpe())
    tokenizer.add_tokens([text])
    assert token_byte_lengths(tokenizer)[tokenizer.convert_tokens_to_ids(text)] == len(text.encode())


@pytest.mark.parametrize("gap", [10, 300, 70_000])
def test_ids_with_gaps(gap):
    tokenizer = gapped_tokenizer(gap)
    assert len(tokenizer) == 14
    lengths = token_byte_lengths(tokenizer)
    assert len(lengths) == vocabulary_size(tokenizer) == gap + 51
    assert lengths[[0, 8, gap, gap + 2]].tolist() == [5, 5, 5, 6]
    assert lengths.count_nonzero() == 12


def test_an_added_token_beyond_the_vocabulary_counts():
    tokenizer = gapped_tokenizer()
    tokenizer.add_tokens(["more"])
    assert vocabulary_size(tokenizer) == tokenizer.convert_tokens_to_ids("more") + 1
    assert token_byte_lengths(tokenizer)[-1] == 4


@pytest.mark.parametrize("tokenizer", [BYTES, byte_level_bpe(), sentencepiece_bpe()])
def test_without_gaps_the_vocabulary_is_as_large_as_the_number_of_tokens(tokenizer):
    assert vocabulary_size(tokenizer) == len(tokenizer)
