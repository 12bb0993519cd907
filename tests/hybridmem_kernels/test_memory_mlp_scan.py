"""memory_mlp_scan, compared with its token-by-token definition."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridmem_kernels import MemoryMLPState, memory_mlp_scan

from .inputs import scan_inputs

CASES = {
    "one token": dict(time=1, chunk_size=16),
    "shorter than a chunk": dict(time=31, chunk_size=32),
    "one over a chunk": dict(time=33, chunk_size=32),
    "one under a default chunk": dict(time=63, chunk_size=64),
    "long": dict(time=1000, chunk_size=128, batch=1, max_grad_norm=0.05),
    "long, small chunks": dict(time=1000, chunk_size=16, batch=1),
    "deep": dict(time=40, chunk_size=16, depth=4),
    "wide": dict(time=40, chunk_size=16, depth=3, expansion=2),
    "given state in an open chunk": dict(time=50, chunk_size=16, filled=(5, 11)),
    "documents": dict(time=90, chunk_size=16, documents=6, filled=(3, 0)),
    "document on a chunk's edge": dict(time=64, chunk_size=16, boundaries=(16, 17, 48)),
    "padding": dict(time=60, chunk_size=16, padded=True, filled=(0, 9)),
    "documents and padding": dict(time=90, chunk_size=16, documents=5, padded=True),
    "bounded gradients": dict(time=40, chunk_size=16, max_grad_norm=0.7),
}


def mlp_inputs(depth=2, expansion=1, filled=None, dim=6, heads=2, **case):
    inputs = scan_inputs(key_dim=dim, value_dim=dim, heads=heads, **case)
    g = torch.Generator().manual_seed(1)
    widths = [dim, *[dim * expansion] * (depth - 1), dim]
    shapes = list(pairwise(widths))

    def matrices(*lead):
        return tuple((torch.randn(*lead, *s, generator=g, dtype=torch.float64) * 0.4).requires_grad_() for s in shapes)

    weights = matrices(heads)
    state = None
    if filled is not None:
        state = MemoryMLPState(*(matrices(2, heads) for _ in range(3)), torch.tensor(filled))
    return inputs, weights, state


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_in_every_output_and_gradient(name):
    case = dict(CASES[name])
    options = dict(chunk_size=case.pop("chunk_size"), max_grad_norm=case.pop("max_grad_norm", None))
    inputs, weights, state = mlp_inputs(**case)
    leaves = [*inputs.leaves(), *weights, *(w for layers in (state or ())[:3] for w in layers)]
    results = []
    for backend in ("reference", "torch"):
        arguments = dict(inputs.arguments(), state=state)
        out, end = memory_mlp_scan(**arguments, weights=weights, **options, backend=backend)
        # Anchors matter only inside an open chunk.
        open_chunk = (end.filled > 0)[:, None, None, None]
        anchors = [a * open_chunk for a in end.anchors]
        results.append(([out * inputs.valid(), *end.weights, *end.momenta, *anchors], end.filled))
    (expected, filled), (got, got_filled) = results
    assert torch.equal(filled, got_filled)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10)
    cotangents = [torch.randn_like(x) for x in expected]
    grads = [torch.autograd.grad(x, leaves, cotangents, allow_unused=True) for x in (expected, got)]
    for a, b in zip(*grads, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if b is None else b, zero if a is None else a, rtol=1e-9, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(
    time=st.integers(1, 30),
    chunk_size=st.integers(1, 35),
    depth=st.integers(2, 3),
    dim=st.integers(1, 7),
    documents=st.integers(1, 4),
    padded=st.booleans(),
    extreme_gates=st.booleans(),
    max_grad_norm=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 1000),
)
def test_any_shape_any_gates_and_any_documents_equal_the_definition(time, chunk_size, documents, max_grad_norm, **case):
    inputs, weights, _ = mlp_inputs(time=time, documents=min(documents, time), **case)
    options = dict(weights=weights, chunk_size=chunk_size, max_grad_norm=max_grad_norm)
    results = []
    for backend in ("reference", "torch"):
        out, state = memory_mlp_scan(**inputs.arguments(), **options, backend=backend)
        results.append((out * inputs.valid(), *state.weights, *state.momenta))
    for expected, got in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pieces", [[17, 1, 1, 31], [1] * 50, [50]])
def test_streaming_moves_no_chunk(pieces):
    inputs, weights, _ = mlp_inputs(time=50, documents=3)
    options = dict(chunk_size=16, max_grad_norm=0.9)
    inputs.document_ids = None
    whole, end = memory_mlp_scan(**inputs.arguments(), weights=weights, **options)
    state, parts, start = None, [], 0
    for length in pieces:
        part = inputs.slice(start, start + length)
        part.state = state
        out, state = memory_mlp_scan(**part.arguments(), weights=weights, **options)
        parts.append(out)
        start += length
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-12)
    for a, b in zip(end.weights, state.weights, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


def test_packed_and_padded_documents_read_as_they_do_alone():
    inputs, weights, _ = mlp_inputs(time=70, batch=1, boundaries=(16, 17, 40))
    inputs.mask = torch.ones(1, 70, dtype=torch.bool)
    inputs.mask[0, [0, 1, 20, 21, 22, 69]] = False
    packed, _ = memory_mlp_scan(**inputs.arguments(), weights=weights, chunk_size=16)
    for start, stop in ((0, 16), (16, 17), (17, 40), (40, 70)):
        keep = inputs.mask[0, start:stop].nonzero()[:, 0] + start
        alone = {name: x[:, :, keep] for name, x in inputs.tensors.items()}
        out, _ = memory_mlp_scan(**alone, weights=weights, chunk_size=16)
        torch.testing.assert_close(packed[:, :, keep], out, rtol=0, atol=1e-12)


def test_gradcheck():
    inputs, weights, _ = mlp_inputs(time=7, batch=1, dim=3, boundaries=(4,))

    def scan(*leaves):
        tensors = dict(zip(inputs.tensors, leaves, strict=False))
        out, state = memory_mlp_scan(
            **tensors, weights=leaves[6:], document_ids=inputs.document_ids, chunk_size=3, max_grad_norm=1.0
        )
        return out, *state.weights, *state.momenta

    assert torch.autograd.gradcheck(scan, [*inputs.tensors.values(), *weights])


def test_no_weight_per_token_is_kept_for_the_backward():
    time, dim, chunk_size = 1024, 32, 64
    inputs, weights, _ = mlp_inputs(time=time, batch=1, heads=2, dim=dim)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        memory_mlp_scan(**inputs.arguments(), weights=weights, chunk_size=chunk_size)
    heads, layers = 2, 2
    assert sum(saved) < heads * (24 * time * dim + 8 * layers * (time / chunk_size) * dim**2)
    assert sum(saved) < heads * layers * time * dim**2


def test_padding_alone_leaves_the_state_and_its_gradient():
    inputs, weights, state = mlp_inputs(time=5, filled=(3, 0))
    arguments = dict(inputs.arguments(), state=state, mask=torch.zeros(2, 5, dtype=torch.bool))
    _, end = memory_mlp_scan(**arguments, weights=weights, chunk_size=16)
    for before, after in zip(state.weights, end.weights, strict=True):
        assert torch.equal(before, after)
        (gradient,) = torch.autograd.grad(after.sum(), before, retain_graph=True)
        assert torch.equal(gradient, torch.ones_like(before))


def test_the_state_is_not_the_parameters_themselves():
    """An optimizer's in-place updates of the parameters must not change a carried state."""
    inputs, weights, _ = mlp_inputs(time=5, batch=1)
    with torch.no_grad():
        _, end = memory_mlp_scan(**inputs.arguments(), weights=weights, chunk_size=16)
    places = {w.untyped_storage().data_ptr() for w in weights}
    assert not any(w.untyped_storage().data_ptr() in places for layers in end[:3] for w in layers)


def test_autocast_does_not_round_the_backward():
    inputs, weights, _ = mlp_inputs(time=20, dtype=torch.float32)
    weights = [w.detach().float().requires_grad_() for w in weights]
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, _ = memory_mlp_scan(**inputs.arguments(), weights=weights, chunk_size=16, max_grad_norm=0.7)
            gradients.append(torch.autograd.grad(out.sum(), [*inputs.leaves(), *weights]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weights=[torch.zeros(2, 6, 6, dtype=torch.float64)]), "use memory_scan for depth 1"),
        (dict(weights=[torch.zeros(2, 6, 5, dtype=torch.float64)] * 2), r"weights\[1\] must be"),
        (dict(max_grad_norm=0.0), "max_grad_norm must be above 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    inputs, weights, _ = mlp_inputs(time=4)
    with pytest.raises(ValueError, match=message):
        memory_mlp_scan(**dict(inputs.arguments(), weights=weights) | change)
