import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridmem.data import ContinuousRows, PackedRows

from .helpers import numbered_corpus

lengths = st.lists(st.integers(2, 12), min_size=1, max_size=8)


def stacked(rows, epoch: int = 0) -> dict[str, torch.Tensor]:
    items = [rows[epoch * len(rows) + index] for index in range(len(rows))]
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def targets(batch: dict[str, torch.Tensor]) -> list[int]:
    return sorted(batch["shift_labels"][batch["shift_labels"] != -100].tolist())


def predictable(corpus) -> list[int]:
    """Return all tokens except the first of each document; tokens are numbered."""
    return sorted(set(corpus.tokens.tolist()) - set(corpus.tokens[corpus.offsets[:-1]].tolist()))


def document_of(corpus, tokens: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.searchsorted(corpus.tokens[corpus.offsets[1:] - 1], tokens.numpy()))


def check_labels(corpus, batch) -> None:
    """Check that labels are the next tokens of the same document, and that ids and padding are right."""
    inputs, labels, documents = batch["input_ids"], batch["shift_labels"], batch["document_ids"]
    padding = documents == -1
    assert (inputs[padding] == corpus.pad_id).all()
    assert (labels[padding] == -100).all()
    assert (documents % len(corpus) == document_of(corpus, inputs))[~padding].all()
    last_of_document = np.isin(inputs.numpy(), corpus.tokens[corpus.offsets[1:] - 1])
    assert (labels[~padding] == torch.where(torch.from_numpy(last_of_document), -100, inputs + 1)[~padding]).all()


@given(lengths, st.integers(1, 15), st.integers(0, 3), st.integers(1, 3))
def test_packed_predicts_every_token_once(lengths, time, seed, multiple):
    corpus = numbered_corpus(lengths)
    rows = PackedRows(corpus, time, seed=seed, pad=True, multiple_of=multiple)
    batch = stacked(rows)
    assert len(rows) % multiple == 0
    assert all(value.shape == (len(rows), time) and value.dtype == torch.int64 for value in batch.values())
    assert targets(batch) == predictable(corpus)
    check_labels(corpus, batch)


@given(lengths, st.integers(1, 15), st.integers(0, 3))
def test_packed_drops_only_the_last_row(lengths, time, seed):
    corpus = numbered_corpus(lengths)
    rows, padded = PackedRows(corpus, time, seed=seed), PackedRows(corpus, time, seed=seed, pad=True)
    assert len(rows) == (sum(lengths) - 1) // time
    for index in range(len(rows)):
        assert all(torch.equal(rows[index][key], padded[index][key]) for key in padded[index])
        assert (rows[index]["document_ids"] >= 0).all()


def test_packed_rows_are_the_same_in_every_epoch_and_differ_by_seed():
    corpus = numbered_corpus([5] * 20)
    rows = PackedRows(corpus, 10, seed=1)
    assert torch.equal(rows[3]["input_ids"], rows[3 + 7 * len(rows)]["input_ids"])
    assert not torch.equal(stacked(rows)["input_ids"], stacked(PackedRows(corpus, 10, seed=2))["input_ids"])


@given(lengths, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2))
def test_continuous_predicts_every_token_once(lengths, time, lanes, seed, epoch):
    corpus = numbered_corpus(lengths)
    rows = ContinuousRows(corpus, time, lanes, seed=seed, pad=True)
    batch = stacked(rows, epoch)
    assert len(rows) % lanes == 0
    assert targets(batch) == predictable(corpus)
    check_labels(corpus, batch)


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 2))
def test_lanes_go_on_from_row_to_row(lanes, time, epoch):
    corpus = numbered_corpus([9, 4, 17, 2, 30])
    rows = ContinuousRows(corpus, time, lanes)
    batch = stacked(rows, epoch)
    check_labels(corpus, batch)
    order = rows.stream_of(epoch).order.tolist()
    stream = np.concatenate([corpus.document(index) for index in order]).tolist()
    steps = len(rows) // lanes
    assert steps == (sum(map(len, map(corpus.document, order))) - 1) // lanes // time
    for lane in range(lanes):
        inputs = batch["input_ids"].view(steps, lanes, time)[:, lane].flatten().tolist()
        assert inputs == stream[lane * steps * time :][: steps * time]


def test_document_ids_tell_epochs_apart():
    corpus = numbered_corpus([40])  # a single document, so that consecutive epochs share it
    rows = ContinuousRows(corpus, 5, lanes=2)
    epochs = [stacked(rows, epoch)["document_ids"] for epoch in range(3)]
    assert [ids.unique().tolist() for ids in epochs] == [[0], [1], [2]]
    corpus = numbered_corpus([5] * 30)
    rows = ContinuousRows(corpus, 5, lanes=2)
    seen = [set(stacked(rows, epoch)["document_ids"].unique().tolist()) for epoch in range(3)]
    assert not seen[0] & seen[1] | seen[1] & seen[2] | seen[0] & seen[2]


def test_continuous_order_changes_with_epoch_and_seed_but_for_validation():
    corpus = numbered_corpus([5] * 30)

    def inputs(epoch, **options):
        return stacked(ContinuousRows(corpus, 5, lanes=3, **options), epoch)["input_ids"]

    assert torch.equal(inputs(1), inputs(1))
    assert not torch.equal(inputs(0), inputs(1))
    assert not torch.equal(inputs(0), inputs(0, seed=1))
    assert torch.equal(inputs(0, reshuffle=False), inputs(4, reshuffle=False))


@given(lengths, st.integers(1, 9), st.integers(1, 5))
def test_padded_lanes_are_equally_full(lengths, time, lanes):
    rows = ContinuousRows(numbered_corpus(lengths), time, lanes, pad=True)
    inputs = sum(lengths) - 1
    filled = (stacked(rows)["document_ids"] != -1).view(-1, lanes, time).sum((0, 2))
    assert filled.sum() == inputs
    assert filled.max() == -(-inputs // lanes)
