import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridmem.data import Document, byte_tokenizer, tokenize
from hybridmem.tasks import NeedleRows
from tests.hybridmem.data.helpers import byte_level_bpe, sentencepiece_bpe

TEXT = "".join(f"line {index} of the text\n    and some more of it\n" for index in range(200))
TOKENIZERS = {"bytes": byte_tokenizer(), "byte-level": byte_level_bpe(), "sentencepiece": sentencepiece_bpe()}


def rows(name: str = "bytes", length: int = 600, text: str = TEXT, **options) -> NeedleRows:
    document = Document("text", len(text), text.encode())
    return NeedleRows(tokenize([document], TOKENIZERS[name]).text, TOKENIZERS[name], length, **options)


def read(item: dict, name: str = "bytes") -> str:
    """Return a row and its answer as text."""
    tokens = [*item["input_ids"].tolist(), int(item["shift_labels"][-1])]
    return TOKENIZERS[name].decode(tokens, skip_special_tokens=True)


def statements(text: str) -> list[tuple[str, str]]:
    return re.findall(r"needle_(\w{4}) = (\d{5})\n", text)


def question(text: str) -> tuple[str, str]:
    (found,) = re.findall(r"\nassert needle_(\w{4}) == (\d{5})$", text)
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=20, deadline=None)
@given(length=st.integers(300, 1500), num_keys=st.integers(1, 4), seed=st.integers(0, 9), row=st.integers(0, 4))
def test_rows(name, length, num_keys, seed, row):
    item = rows(name, length, num_keys=num_keys, num_rows=5, seed=seed)[row]
    assert set(item) == {"input_ids", "shift_labels", "document_ids"}
    assert all(value.shape == (length,) and value.dtype == torch.int64 for value in item.values())
    assert item["document_ids"].unique().tolist() == [row]

    text = read(item, name)
    needles, (key, value) = statements(text), question(text)
    assert len({k for k, _ in needles}) == len({v for _, v in needles}) == len(needles) == num_keys
    assert dict(needles)[key] == value
    assert text[: text.rindex("assert")].count(f"needle_{key}") == 1

    labelled = item["shift_labels"] != -100
    assert TOKENIZERS[name].decode(item["shift_labels"][labelled]).strip() == value
    assert labelled[-int(labelled.sum()) :].all()
    assert torch.equal(item["input_ids"][1:][labelled[:-1]], item["shift_labels"][:-1][labelled[:-1]])


def test_a_row_begins_with_the_mark_of_a_document():
    assert rows("bytes")[0]["input_ids"][0] == 257
    assert rows("byte-level")[0]["input_ids"][0] == TOKENIZERS["byte-level"].eos_token_id


def test_rows_without_needles_equal_the_text():
    item = rows(length=900, num_keys=3)[2]
    text = re.sub(r"needle_\w{4} = \d{5}\n", "", read(item))
    assert text[: text.rindex("\nassert")] in TEXT * 2


def test_depths_are_spread_evenly():
    found = [read(item) for item in map(rows(length=4000, num_rows=10).__getitem__, range(10))]
    depths = [text.index("needle_") / 3970 for text in found]
    assert np.allclose(depths, (np.arange(10) + 0.5) / 10, atol=0.02)


def test_needles_stand_between_lines():
    for row in range(5):
        for line in read(rows(num_keys=4, num_rows=5)[row]).splitlines():
            assert "needle_" not in line or re.fullmatch(r"(needle_\w{4} =|assert needle_\w{4} ==) \d{5}", line)


def test_rows_follow_from_the_seed():
    first, again, other = rows(seed=1), rows(seed=1), rows(seed=2)
    assert torch.equal(first[3]["input_ids"], again[3]["input_ids"])
    assert not torch.equal(first[3]["input_ids"], other[3]["input_ids"])
    assert not torch.equal(first[3]["input_ids"], first[4]["input_ids"])
    assert len(first) == 20


def test_short_text_is_repeated():
    text = read(rows(length=500, text="one line\nanother line\n")[0])
    assert text.count("another line") > 10


def test_refusals():
    with pytest.raises(ValueError, match="needle_lengths=100 is too short for needle_keys=4"):
        rows(length=100, num_keys=4)
    with pytest.raises(ValueError, match="no token of the held-out text ends a line"):
        rows(text="no end")
