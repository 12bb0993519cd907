"""memory_scan, compared with its token-by-token definition and with itself for other cuts of the row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridmem_kernels import MemoryState, memory_scan
from hybridmem_kernels.memory_scan.chunked import fitting_size

from .inputs import scan_inputs

CASES = {
    "one token": dict(time=1, chunk_size=16),
    "shorter than a chunk": dict(time=63, chunk_size=64),
    "one over a chunk": dict(time=65, chunk_size=64),
    "odd chunk size": dict(time=50, chunk_size=23),
    "long": dict(time=1000, chunk_size=128),
    "long, small chunks": dict(time=1000, chunk_size=16),
    "wide values": dict(time=65, chunk_size=32, key_dim=5, value_dim=17),
    "wide keys": dict(time=65, chunk_size=32, key_dim=17, value_dim=3),
    "given state": dict(time=65, chunk_size=32, given_state=True),
    "documents": dict(time=200, chunk_size=64, documents=7, given_state=True),
    "document on a chunk's edge": dict(time=128, chunk_size=32, boundaries=(32, 33, 96), given_state=True),
    "padding": dict(time=100, chunk_size=32, padded=True, given_state=True),
    "documents and padding": dict(time=150, chunk_size=32, documents=5, padded=True, given_state=True),
    "gates at their ends": dict(time=70, chunk_size=16, extreme_gates=True, given_state=True),
}


def run(inputs, backend, chunk_size=64):
    out, state = memory_scan(**inputs.arguments(), chunk_size=chunk_size, backend=backend)
    return out, *state


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_in_every_output_and_gradient(name):
    case = dict(CASES[name])
    chunk_size = case.pop("chunk_size")
    inputs = scan_inputs(**case)
    expected, got = run(inputs, "reference"), run(inputs, "torch", chunk_size)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)
    cotangents = [torch.randn_like(x) for x in expected]
    leaves = inputs.leaves()
    grads = [torch.autograd.grad(outputs, leaves, cotangents) for outputs in (expected, got)]
    for leaf, a, b in zip(inputs.leaf_names(), *grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10, msg=lambda m, leaf=leaf: f"gradient of {leaf}: {m}")


def test_gradcheck():
    inputs = scan_inputs(time=11, batch=1, heads=2, key_dim=3, value_dim=4, documents=3, given_state=True)

    def scan(*leaves):
        tensors = dict(zip(inputs.tensors, leaves, strict=False))
        out, state = memory_scan(
            **tensors, state=MemoryState(*leaves[6:]), document_ids=inputs.document_ids, chunk_size=4
        )
        return out, *state

    assert torch.autograd.gradcheck(scan, inputs.leaves())


@settings(max_examples=25, deadline=None)
@given(data=st.data(), time=st.integers(1, 60), chunk_size=st.integers(1, 70))
def test_any_cut_of_the_row_gives_the_same(data, time, chunk_size):
    inputs = scan_inputs(time=time, documents=min(3, time), padded=data.draw(st.booleans()), given_state=True)
    whole, end = memory_scan(**inputs.arguments(), chunk_size=chunk_size)
    cut = data.draw(st.integers(0, time))
    state, parts = inputs.state, []
    for start, stop in ((0, cut), (cut, time)):
        part = inputs.slice(start, stop)
        part.state = _reset_where_a_document_begins(inputs, start, state)
        out, state = memory_scan(**part.arguments(), chunk_size=chunk_size)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2) * inputs.valid(), whole * inputs.valid(), rtol=0, atol=1e-10)
    for a, b in zip(end, state, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    time=st.integers(1, 40),
    chunk_size=st.integers(1, 50),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    documents=st.integers(1, 5),
    padded=st.booleans(),
    extreme_gates=st.booleans(),
    given_state=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_any_gates_and_any_documents_equal_the_definition(time, chunk_size, documents, **case):
    inputs = scan_inputs(time=time, documents=min(documents, time), **case)
    for expected, got in zip(run(inputs, "reference"), run(inputs, "torch", chunk_size), strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def _reset_where_a_document_begins(inputs, start, state):
    """Reset the state before a call that starts a new document, which is the caller's task."""
    if start == 0 or inputs.document_ids is None or start >= inputs.document_ids.shape[1]:
        return state
    ids, mask = inputs.document_ids, inputs.valid()[:, 0, :, 0]
    kept = []
    for row in range(len(ids)):
        before, after = ids[row, :start][mask[row, :start]], ids[row, start:][mask[row, start:]]
        kept.append(not (len(before) and len(after) and before[-1] != after[0]))
    keep = torch.tensor(kept)[:, None, None, None]
    return MemoryState(*(x * keep for x in state))


@pytest.mark.parametrize("chunk_size", [16, 32])
def test_packed_documents_read_as_they_do_alone(chunk_size):
    inputs = scan_inputs(time=70, batch=1, boundaries=(16, 17, 40))
    packed, _ = memory_scan(**inputs.arguments(), chunk_size=chunk_size)
    alone = []
    for start, stop in ((0, 16), (16, 17), (17, 40), (40, 70)):
        part = inputs.slice(start, stop)
        part.document_ids = None
        alone.append(memory_scan(**part.arguments(), chunk_size=chunk_size)[0])
    torch.testing.assert_close(packed, torch.cat(alone, dim=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_accumulate_in_float32(dtype):
    inputs = scan_inputs(time=300, key_dim=16, value_dim=16)
    rounded = {name: x.detach().to(dtype) for name, x in inputs.tensors.items()}
    out, state = memory_scan(**rounded)
    again, _ = memory_scan(**{name: x.double() for name, x in rounded.items()})
    assert out.dtype == dtype
    assert state.weight.dtype == torch.float32
    # Apart from the rounding of inputs and outputs, the scan itself only adds float32 errors.
    tolerance = 4 * torch.finfo(dtype).eps + 1e-5
    torch.testing.assert_close(out.double(), again, rtol=tolerance, atol=tolerance)
    assert torch.isfinite(state.weight).all()


@pytest.mark.parametrize(("time", "most", "size"), [(133, 32, 24), (1024, 64, 64), (50, 23, 16), (5, 16, 5)])
def test_chunks_pad_the_row_as_little_as_they_can(time, most, size):
    assert fitting_size(time, most) == size


def test_an_empty_row_returns_the_state():
    inputs = scan_inputs(time=4, given_state=True)
    empty = inputs.slice(2, 2)
    empty.state = inputs.state
    out, state = memory_scan(**empty.arguments())
    assert out.shape[2] == 0
    assert torch.equal(state.weight, inputs.state.weight)


def test_no_weight_per_token_is_kept_for_the_backward():
    time, dim, chunk_size = 1024, 32, 32
    inputs = scan_inputs(time=time, batch=1, heads=1, key_dim=dim, value_dim=dim, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        memory_scan(**inputs.arguments(), chunk_size=chunk_size)
    # A dozen rows of `dim` or `chunk_size` per token, and two states per chunk; a matrix per token would take dim².
    assert sum(saved) < 16 * time * dim + 3 * (time / chunk_size) * 2 * dim**2
    assert sum(saved) < 0.7 * time * dim**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(chunk_size=0), "chunk_size must be at least 1"),
        (dict(backend="cuda"), "backend='cuda' does not exist"),
    ],
)
def test_bad_settings_are_named(change, message):
    inputs = scan_inputs(time=4)
    with pytest.raises((ValueError, TypeError), match=message):
        memory_scan(**inputs.arguments(), **change)


def test_a_state_of_another_memory_is_named():
    inputs = scan_inputs(time=4)
    inputs.state = MemoryState(torch.zeros(2, 2, 8, 4), torch.zeros(2, 2, 8, 4))
    with pytest.raises(ValueError, match=r"state.weight must be \(2, 2, 8, 8\)"):
        memory_scan(**inputs.arguments())


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_single_tokens_advance_a_state_in_place_only_where_they_may(in_place):
    inputs = scan_inputs(time=9, given_state=True)
    whole, end = memory_scan(**inputs.arguments())
    state, parts = MemoryState(*(x.detach().clone() for x in inputs.state)), []
    first, before = state, [x.clone() for x in state]
    for t in range(9):
        part = inputs.slice(t, t + 1)
        part.state = state
        out, state = memory_scan(**part.arguments(), in_place=in_place)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-12)
    for expected, got, start, old in zip(end, state, first, before, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        assert torch.equal(start, got if in_place else old)


@torch.no_grad()
def test_autocast_leaves_a_single_token_in_float32():
    inputs = scan_inputs(time=1, given_state=True)
    tensors = {name: x.float() for name, x in inputs.tensors.items()}
    state = MemoryState(*(x.float() for x in inputs.state))
    expected = memory_scan(**tensors, state=state)
    with torch.autocast("cpu", torch.bfloat16):
        got = memory_scan(**tensors, state=state)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], expected[1], strict=True))
