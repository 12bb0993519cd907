"""Padding anywhere in a row, with equal logits and gradients for every cut of the text."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, DynamicCache

from hybridmem.model.sequence import compact_rows
from tests.hybridmem.model.test_attention import flash_as_eager
from tests.hybridmem.models import KINDS, tiny_model, tokens

TIME = 26


def padding_mask(*spans, time=TIME):
    """Return a mask with one row per list of padding spans."""
    mask = torch.ones(len(spans), time, dtype=torch.long)
    for row, row_spans in zip(mask, spans, strict=True):
        for start, end in row_spans:
            row[start:end] = 0
    return mask


# Inside; before, inside and after; longer than the window and a segment; only padding.
MASK = padding_mask([(5, 9)], [(0, 3), (6, 7), (11, 13), (22, 26)], [(4, 17)], [(0, 26)])
CUTS = {
    "in padding": [0, 7, 26],
    "at its edges": [0, 5, 9, 26],
    "a piece of padding": [0, 4, 6, 8, 12, 26],
    "one by one": range(27),
}


def counted(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def read(model, ids, cuts, **rows):
    """Read `ids` and per-token arguments in pieces, with a mask over all tokens so far, as in transformers."""
    cache, logits = DynamicCache(config=model.config), []
    for start, end in pairwise(cuts):
        first = {"attention_mask": 0}
        piece = {name: row[:, first.get(name, start) : end] for name, row in rows.items() if row is not None}
        logits.append(model(ids[:, start:end], past_key_values=cache, use_cache=True, **piece).logits)
    return torch.cat(logits, dim=1), cache


def valid_logits_and_gradients(model, ids, cuts, valid, **rows):
    logits = read(model, ids, cuts, **rows)[0] * valid[..., None]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5), dtype=logits.dtype)
    return logits, *torch.autograd.grad((logits * weights).sum(), list(model.parameters()), materialize_grads=True)


def assert_cuts_agree(model, ids, cuts, valid, **rows):
    whole = valid_logits_and_gradients(model, ids, [0, ids.shape[1]], valid, **rows)
    pieces = valid_logits_and_gradients(model, ids, cuts, valid, **rows)
    for expected, got in zip(whole, pieces, strict=True):
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_changes_neither_logits_nor_gradients(kind, cuts):
    model, ids = tiny_model(**KINDS[kind]), tokens(batch=4, time=TIME)
    assert_cuts_agree(model, ids, cuts, MASK, attention_mask=MASK, position_ids=counted(MASK))


@st.composite
def padded_rows(draw):
    """Draw a kind of model, padding by mask, document ids or both, positions, and cuts."""
    batch, time = draw(st.integers(1, 3)), draw(st.integers(2, 24))
    flags = st.lists(st.booleans(), min_size=batch * time, max_size=batch * time)

    def rows():
        return torch.tensor(draw(flags)).view(batch, time)

    mask = rows().long() if draw(st.booleans()) else None
    documents = rows().cumsum(1) % draw(st.integers(2, 5)) if draw(st.booleans()) else None
    if documents is not None and draw(st.booleans()):
        documents = documents.masked_fill(rows(), -1)
    valid = torch.ones(batch, time, dtype=torch.long) if mask is None else mask
    jumping = torch.arange(batch * time).view(batch, time) % 7
    positions = draw(st.sampled_from([None, counted(valid), torch.arange(time)[None], jumping]))
    inside = draw(st.lists(st.integers(1, time - 1), max_size=time, unique=True))
    if documents is not None:
        valid = valid * (documents != -1)
    arguments = dict(attention_mask=mask, document_ids=documents, position_ids=positions)
    return tokens(batch, time), [0, *sorted(inside), time], valid, arguments


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(case=padded_rows())
def test_any_cut_of_any_padding(kind, case):
    ids, cuts, valid, arguments = case
    assert_cuts_agree(tiny_model(**KINDS[kind]), ids, cuts, valid, **arguments)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_within_the_window_changes_nothing(kind):
    """Padding counts as distance in a window and is skipped elsewhere."""
    model = tiny_model(**KINDS[kind], attention_window=TIME)
    ids = tokens(batch=3, time=TIME)
    logits, _ = read(model, ids, [0, TIME], attention_mask=MASK[:3], position_ids=counted(MASK[:3]))
    for row, valid in enumerate(MASK[:3].bool()):
        alone = model(ids[row : row + 1, valid]).logits[0]
        torch.testing.assert_close(logits[row, valid], alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_generation_does_not_depend_on_the_size_of_prefill_chunks(kind):
    model, mask = tiny_model(**KINDS[kind]), padding_mask([(5, 9)], [(0, 3), (7, 8), (12, 14)], [(3, 15)], time=16)
    ids = tokens(batch=3, time=16)
    how = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **how, use_cache=False)
    for size in (None, 1, 4, 9):
        assert torch.equal(model.generate(ids, **how, prefill_chunk_size=size), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_padding_follow_beams_and_fan_out(kind):
    model, ids, mask, positions = tiny_model(**KINDS[kind]), tokens(4, TIME), MASK, counted(MASK)
    rows = torch.tensor([2, 1, 1, 0, 3])

    def go_on(change):
        _, cache = read(model, ids, [0, 3, 12], attention_mask=mask, position_ids=positions)
        change(cache)
        return model(
            ids[rows, 12:], attention_mask=mask[rows], position_ids=positions[rows, 12:], past_key_values=cache
        ).logits

    whole, _ = read(model, ids, [0, TIME], attention_mask=mask, position_ids=positions)
    valid = mask[rows, 12:].bool()
    expected = whole[rows, 12:][valid]

    def fan_out(cache):
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(2 * rows)

    for change in (lambda cache: cache.reorder_cache(rows), fan_out):
        torch.testing.assert_close(go_on(change)[valid], expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_with_padding_inside(kind):
    model, mask = tiny_model(**KINDS[kind]), padding_mask([(4, 7)], [(0, 2), (5, 6)], time=10)
    ids = tokens(batch=2, time=10)
    how = dict(attention_mask=mask, num_beams=3, max_new_tokens=5, pad_token_id=0)
    expected = model.generate(ids, **how, use_cache=False)
    assert torch.equal(model.generate(ids, **how, prefill_chunk_size=5), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_positions_start_no_document_in_a_stream(kind):
    """Jumps in positions start documents only in a forward pass without a cache, never in a stream's first piece."""
    model, ids = tiny_model(**KINDS[kind]), tokens(time=TIME)
    positions = torch.cat((torch.arange(11), torch.arange(15)))[None]
    whole, _ = read(model, ids, [0, TIME], position_ids=positions)
    for cuts in ([0, 8, TIME], [0, 11, 20, TIME]):
        torch.testing.assert_close(read(model, ids, cuts, position_ids=positions)[0], whole, rtol=0, atol=1e-10)


def test_tokens_are_moved_together_only_where_padding_separates_them():
    mask = padding_mask([(0, 2)], [(3, 4)], time=4).bool()
    new, begun = torch.tensor([False, True]), torch.tensor([True, False])
    assert compact_rows(mask, new) is None
    compaction = compact_rows(mask, begun)
    assert compaction.compact(torch.arange(4).expand(2, -1)).tolist() == [[2, 3, 0, 1], [0, 1, 2, 3]]
    x = torch.randn(2, 4, 3)
    assert torch.equal(compaction.restore(compaction.compact(x)), x)


@torch.no_grad()
def test_flash_attention_refuses_padding_inside_a_window(monkeypatch):
    """FlashAttention drops padding before it applies the window, so results would depend on the cut."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_as_eager)
    ids = tokens(batch=2, time=TIME)
    outside = padding_mask([(0, 5)], [(20, 26)])
    for variant in ("swa", "full"):
        model = tiny_model(variant=variant, num_persistent_tokens=0)
        expected = [model(ids, attention_mask=mask).logits[mask.bool()] for mask in (outside, MASK[:2])]
        model.config._attn_implementation = "flash_attention_2"
        got = model(ids, attention_mask=outside).logits[outside.bool()]
        torch.testing.assert_close(got, expected[0], rtol=0, atol=1e-10)
        if variant == "full":
            got = model(ids, attention_mask=MASK[:2]).logits[MASK[:2].bool()]
            torch.testing.assert_close(got, expected[1], rtol=0, atol=1e-10)
        else:
            for cuts in ([0, TIME], [0, 7, TIME]):
                with pytest.raises(ValueError, match="attention_window=7, and a row has padding between its tokens"):
                    read(model, ids, cuts, attention_mask=MASK[:2])
