"""Equal logits from one forward pass, from pieces and token by token, padded or packed."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hybridmem.model.cache import state_bytes
from tests.hybridmem.models import KINDS, VARIANTS, tiny_model, tokens


def read_in_pieces(model, ids, pieces, **rows):
    """Return the logits of `ids` read in pieces through one cache, with per-token arguments cut accordingly."""
    cache, logits = DynamicCache(config=model.config), []
    cut = {name: row.split(pieces, dim=1) for name, row in rows.items()}
    for n, piece in enumerate(ids.split(pieces, dim=1)):
        arguments = {name: parts[n] for name, parts in cut.items()}
        logits.append(model(piece, past_key_values=cache, use_cache=True, **arguments).logits)
    return torch.cat(logits, dim=1), cache


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([3, 1, 1, 10, 7, 18], id="pieces"),
        pytest.param([1] * 40, id="one by one"),
        pytest.param([8, 32], id="halves"),
    ],
)
def test_pieces_give_the_logits_of_one_forward(kind, pieces):
    model, ids = tiny_model(**KINDS[kind]), tokens()
    streamed, _ = read_in_pieces(model, ids, pieces)
    torch.testing.assert_close(streamed, model(ids).logits, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_float32_streams_within_1e_4(kind):
    model, ids = tiny_model(torch.float32, **KINDS[kind]), tokens(time=150)
    streamed, _ = read_in_pieces(model, ids, [100] + [1] * 50)
    torch.testing.assert_close(streamed, model(ids).logits, rtol=0, atol=1e-4)


def documents(lengths):
    return torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)])


PACKED = torch.stack([documents((6, 1, 13, 20)), documents((8, 8, 23, 1))])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[40], [6, 1, 13, 20], [3, 5, 8, 24]], ids=["whole", "on edges", "off edges"])
def test_packed_documents_give_the_logits_they_give_alone(kind, pieces):
    model, ids = tiny_model(**KINDS[kind]), tokens()
    packed, _ = read_in_pieces(model, ids, pieces, document_ids=PACKED)
    for row, row_documents in enumerate(PACKED):
        for document in row_documents.unique():
            place = row_documents == document
            alone = model(ids[row : row + 1, place]).logits[0]
            torch.testing.assert_close(packed[row, place], alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_start_again_are_documents(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens()
    positions = torch.cat((torch.arange(11), torch.arange(29)))[None].expand(2, -1)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, 11:], model(ids[:, 11:]).logits, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, side):
    model, ids = tiny_model(**KINDS[kind]), tokens(batch=1, time=20)
    expected = model(ids).logits
    padding = torch.zeros(1, 9, dtype=torch.long)
    parts = (padding, ids) if side == "left" else (ids, padding)
    mask = torch.cat([torch.ones_like(p) if p is ids else padding for p in parts], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(torch.cat(parts, dim=1), attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[mask.bool()], expected[0], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[5, 4, 20], [29], [20] + [1] * 9], ids=["pieces", "whole", "one by one"])
def test_rows_of_different_lengths_stream_together(kind, pieces):
    model, ids = tiny_model(**KINDS[kind]), tokens(batch=3, time=29)
    mask = torch.ones_like(ids)
    for row, padded in enumerate((0, 9, 12)):
        mask[row, :padded] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits, end = DynamicCache(config=model.config), [], 0
    for length in pieces:
        start, end = end, end + length
        step = dict(input_ids=ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end])
        logits.append(model(**step, past_key_values=cache, use_cache=True).logits)
    logits = torch.cat(logits, dim=1)
    for row, padded in enumerate((0, 9, 12)):
        alone = model(ids[row : row + 1, padded:]).logits[0]
        torch.testing.assert_close(logits[row, padded:], alone, rtol=0, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_any_cut_of_packed_rows_with_mixed_layers(data):
    model = tiny_model(layer_types=["mac", "mag"], memory_depth=data.draw(st.integers(1, 2)))
    time = data.draw(st.integers(2, 30))
    ids = tokens(time=time)
    starts = torch.tensor([[data.draw(st.booleans()) for _ in range(time)] for _ in range(2)])
    document_ids = starts.cumsum(1)
    cut = data.draw(st.integers(1, time - 1))
    streamed, _ = read_in_pieces(model, ids, [cut, time - cut], document_ids=document_ids)
    whole = model(ids, document_ids=document_ids).logits
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_state_does_not_grow(variant, depth):
    model, ids = tiny_model(torch.float32, variant=variant, memory_depth=depth), tokens(time=300)
    sizes = []
    cache = DynamicCache(config=model.config)
    for piece in ids.split(30, dim=1):
        model(piece, past_key_values=cache, use_cache=True)
        sizes.append(state_bytes(cache))
    if variant == "full":
        assert sizes[-1] > 2 * sizes[3]
    else:
        assert sizes[-1] == sizes[3]
    assert cache.get_seq_length() == 300


@torch.no_grad()
def test_positions_far_out_are_as_exact_as_near_ones():
    """RoPE depends on distances only; at 2,000,000, float32 angles would be off by a quarter of a radian."""
    model, ids = tiny_model(torch.float32, variant="swa"), tokens()
    near = model(ids).logits
    far = model(ids, position_ids=2_000_000 + torch.arange(40)[None]).logits
    torch.testing.assert_close(far, near, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_follow_beam_search_and_fan_out(variant):
    model, ids = tiny_model(variant=variant), tokens(batch=2, time=20)
    order = torch.tensor([1, 1, 0])
    cache = DynamicCache(config=model.config)
    model(ids[:, :13], past_key_values=cache, use_cache=True)
    cache.reorder_cache(order)
    reordered = model(ids[order, 13:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(reordered, model(ids[order]).logits[:, 13:], rtol=0, atol=1e-10)
    cache = DynamicCache(config=model.config)
    model(ids[:, :13], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    again = model(ids[:, 13:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, model(ids).logits[:, 13:], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="cannot be rolled back"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert state_bytes(cache) == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_document_id_that_comes_back_is_another_document(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens()
    again = torch.tensor([0] * 5 + [1] * 3 + [0] * 32).expand(2, -1)
    for pieces in ([40], [8, 32], [3, 37]):
        logits, _ = read_in_pieces(model, ids, pieces, document_ids=again)
        torch.testing.assert_close(logits[:, 8:], model(ids[:, 8:]).logits, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_document_may_start_after_calls_without_ids(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens()
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache, use_cache=True)
    other = torch.full((2, 32), 3)
    logits = model(ids[:, 8:], document_ids=other, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(ids[:, 8:]).logits, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_are_decoded_as_they_are_alone(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(time=30)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    cache, logits = DynamicCache(config=model.config), []
    for end in [12, *range(13, 31)]:
        start = 0 if end == 12 else end - 1
        piece = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits
        logits.append(piece)
    decoded = torch.cat(logits, dim=1)
    torch.testing.assert_close(decoded[0], model(ids[:1]).logits[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(decoded[1, 7:], model(ids[1:, 7:]).logits[0], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_cache_goes_its_own_way(kind):
    model, ids = tiny_model(**KINDS[kind]), tokens(time=20)
    _, cache = read_in_pieces(model, ids[:, :10], [8, 1, 1])
    other = copy.deepcopy(cache)
    for n in range(10, 14):  # another text in one of the two
        model(ids[:, n : n + 1].flip(0), past_key_values=other, use_cache=True)
    rest = model(ids[:, 10:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 10:], rtol=0, atol=1e-10)
