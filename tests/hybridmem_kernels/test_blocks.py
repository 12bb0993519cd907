"""Blocks start at fixed positions of their document, whatever precedes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridmem_kernels.blocks import even_blocks, split_blocks


def sequential(ids, mask, size, filled):
    """Compute (block, first tokens of blocks, tokens in the open block) token by token."""
    block, count, last, out = (0 if filled else -1), filled, None, []
    for token, counts in zip(ids, mask, strict=True):
        if not counts:
            out.append(None)
            continue
        if last is not None and token != last:
            count = 0
        opens = count % size == 0
        block += opens
        out.append((block, opens))
        last, count = token, count + 1
    return out, count % size


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=12, max_size=12),
        min_size=1,
        max_size=3,
    ),
    size=st.integers(1, 7),
    data=st.data(),
)
def test_equals_the_sequential_count(rows, size, data):
    ids = torch.tensor([[sum(step for step, _ in row[: i + 1]) for i in range(12)] for row in rows])
    mask = torch.tensor([[counts for _, counts in row] for row in rows])
    filled = torch.tensor([data.draw(st.integers(0, size - 1)) for _ in rows])
    blocks = split_blocks(12, size, filled, ids, mask)
    for row in range(len(rows)):
        expected, left = sequential(ids[row].tolist(), mask[row].tolist(), size, int(filled[row]))
        assert int(blocks.filled[row]) == left
        for block in range(blocks.times.shape[1]):
            tokens = [t for t, place in enumerate(expected) if place is not None and place[0] == block]
            assert blocks.times[row, block][blocks.valid[row, block]].tolist() == tokens
            assert bool(blocks.begins[row, block]) == any(expected[t][1] for t in tokens)


def test_gather_and_scatter_undo_each_other():
    ids = torch.tensor([[0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0]])
    blocks = split_blocks(7, 3, torch.tensor([2, 0]), ids)
    x = torch.randn(2, 4, 7, 5)
    assert torch.equal(blocks.scatter(blocks.gather(x)), x)


@pytest.mark.parametrize("filled", range(6))
@pytest.mark.parametrize("time", [1, 2, 5, 6, 7, 12, 15])
def test_even_blocks_are_those_of_rows_that_are_as_full_each(time, filled):
    expected = split_blocks(time, 6, torch.full((2,), filled))
    for got, wanted in zip(even_blocks(2, time, 6, torch.device("cpu"), filled), expected, strict=True):
        assert torch.equal(got, wanted)
