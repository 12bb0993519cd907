from collections import Counter
from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hybridmem.data import EndlessSampler
from hybridmem.data.order import permutation, whole_steps


def sequence(num_rows: int, count: int, start: int = 0, **options) -> list[int]:
    """Return `count` indices of the endless sequence, over several iterations."""
    place = start
    sampler = EndlessSampler(num_rows, position=lambda: place, **options)
    indices: list[int] = []
    while len(indices) < count:
        indices += sampler
        place = start + len(indices) * sampler.num_replicas
    return indices[:count]


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 3))
def test_every_epoch_has_every_row(num_rows, seed, epochs):
    indices = sequence(num_rows, num_rows * epochs, seed=seed)
    for epoch in range(epochs):
        rows = indices[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(rows) == [epoch * num_rows + row for row in range(num_rows)]


@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 3))
def test_resumes_at_any_row(num_rows, start, seed):
    assert sequence(num_rows, 50, start, seed=seed) == sequence(num_rows, start + 50, seed=seed)[start:]


def test_order_follows_from_seed_and_epoch():
    first, second = np.split(np.array(sequence(50, 100, seed=3)), 2)
    assert sequence(50, 100, seed=3) == [*first, *second]
    assert first.tolist() != (second - 50).tolist()
    assert sequence(50, 50, seed=4) != first.tolist()
    assert sequence(5, 10, seed=None) == list(range(10))


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 20))
def test_processes_share_the_sequence(num_rows, world_size, start):
    whole = sequence(num_rows, start + 12 * world_size, seed=0)[start:]
    shares = [sequence(num_rows, 12, start, seed=0, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [index for together in zip(*shares, strict=True) for index in together] == whole


def test_iterating_changes_nothing_and_set_epoch_neither():
    sampler = EndlessSampler(20, seed=0)
    before = list(sampler)
    list(islice(sampler, 3))
    sampler.set_epoch(7)
    assert list(sampler) == before
    assert len(sampler) == 20


def test_permutations_by_key():
    assert sorted(permutation(9, 1, 2)) == list(range(9))
    drawn = Counter(tuple(permutation(30, *key)) for key in [(0, 0), (1, 1), (0, 1), (1, 0), (0, 2)])
    assert max(drawn.values()) == 1
    assert permutation(30, 1, 2).tolist() == permutation(30, 1, 2).tolist()


@given(st.integers(4, 60), st.integers(1, 4), st.integers(1, 2), st.integers(1, 5))
def test_an_epoch_ends_with_a_step_that_accumulates(num_rows, batch_size, world_size, batches_of_steps):
    """An epoch is extended by as few batches as possible; without accumulation it is unchanged."""
    share = EndlessSampler(num_rows, seed=0, world_size=world_size)
    count = whole_steps(num_rows, batch_size, world_size, batches_of_steps)
    longer = EndlessSampler(num_rows, seed=0, world_size=world_size, num_samples=count)
    batches, before = len(longer) // batch_size, len(share) // batch_size
    assert batches % batches_of_steps == 0
    assert 0 <= batches - before < batches_of_steps
    assert list(longer)[: before * batch_size] == list(share)[: before * batch_size]
    assert whole_steps(num_rows, batch_size, world_size, 1) is None
