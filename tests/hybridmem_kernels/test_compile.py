"""Operators under torch.compile: a single graph, equal numbers, and valid torch.library registrations."""

import pytest
import torch
from torch import Tensor

from hybridmem_kernels import MemoryState, attention_divergence, memory_mlp_scan, memory_scan, use_backend
from hybridmem_kernels.memory_mlp_scan.reference import initial_state
from tests.unchecked import passes_without_shape_checks, with_shape_checks, without_shape_checks

from .inputs import ScanInputs, scan_inputs
from .test_memory_mlp_scan import mlp_inputs

BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.filterwarnings("ignore::RuntimeWarning"))]
SCANS = {
    "plain": dict(time=20, heads=1),
    "one token": dict(time=1, heads=1),
    "documents, padding and a state": dict(time=20, heads=1, documents=3, padded=True, given_state=True),
}


@with_shape_checks
@pytest.mark.slow
def test_in_a_process_without_shape_checks():
    passes_without_shape_checks(__file__)


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield request.param


def single(inputs: ScanInputs) -> ScanInputs:
    """Convert inputs to float32, which both backends accept."""
    tensors = {name: x.detach().float().requires_grad_() for name, x in inputs.tensors.items()}
    state = inputs.state and MemoryState(*(x.detach().float().requires_grad_() for x in inputs.state))
    return ScanInputs(tensors, state, inputs.document_ids, inputs.mask)


def check(function, arguments: dict, leaves: list[Tensor], valid: Tensor | None = None) -> None:
    """Check that compiled and eager calls have equal outputs and gradients, ignoring outputs where `valid` is False."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        first, *others = call(**arguments)
        outputs = [first if valid is None else first * valid, *others]
        differentiable = [x for x in outputs if x.requires_grad]
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in differentiable]
        gradients = torch.autograd.grad(differentiable, leaves, weights, materialize_grads=True)
        results.append([*outputs, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def flat_scan(**arguments) -> tuple[Tensor, ...]:
    out, state = memory_scan(**arguments, chunk_size=16)
    return out, *state


def flat_mlp_scan(**arguments) -> tuple[Tensor, ...]:
    out, state = memory_mlp_scan(**arguments, chunk_size=16, max_grad_norm=0.7)
    is_open = (state.filled > 0)[:, None, None, None]
    return out, *state.weights, *state.momenta, *(anchors * is_open for anchors in state.anchors)


@without_shape_checks
@pytest.mark.parametrize("case", SCANS)
def test_memory_scan(case, backend):
    inputs = single(scan_inputs(key_dim=16, value_dim=24, **SCANS[case]))
    check(flat_scan, inputs.arguments(), inputs.leaves(), inputs.valid())


@without_shape_checks
@pytest.mark.parametrize("filled", [None, (3, 0)], ids=["plain", "documents, padding and a state"])
def test_memory_mlp_scan(filled, backend):
    case = {} if filled is None else dict(documents=3, padded=True, filled=filled)
    inputs, weights, state = mlp_inputs(time=20, dim=16, heads=1, **case)
    layers = [weights, *(state or ())[:3]]
    layers = [tuple(w.detach().float().requires_grad_() for w in group) for group in layers]
    inputs = single(inputs)
    arguments = dict(inputs.arguments(), weights=layers[0])
    arguments["state"] = None if state is None else type(state)(*layers[1:], state.filled)
    leaves = [*inputs.tensors.values(), *(w for group in layers for w in group)]
    check(flat_mlp_scan, arguments, leaves, inputs.valid())


@without_shape_checks
@pytest.mark.parametrize("masked", [False, True])
def test_attention_divergence(masked, backend):
    generator = torch.Generator().manual_seed(0)
    q, k, q_ref, k_ref = (torch.randn(2, heads, 20, 16, generator=generator) for heads in (4, 2, 3, 1))
    arguments = dict(q=q.requires_grad_(), k=k.requires_grad_(), q_ref=q_ref, k_ref=k_ref, window=7, window_ref=None)
    if masked:
        arguments |= {mask: torch.rand(2, 20, generator=generator) < 0.6 for mask in ("query_mask", "key_mask")}
    check(lambda **given: tuple(attention_divergence(**given)), arguments, [q, k])


@without_shape_checks
def test_without_gradients_a_compiled_call_is_an_eager_one(backend):
    inputs = single(scan_inputs(time=1, key_dim=16, value_dim=16, given_state=True))
    with torch.no_grad():
        expected = flat_scan(**inputs.arguments())
        got = torch.compile(flat_scan, fullgraph=True, backend="aot_eager")(**inputs.arguments())
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@without_shape_checks
def test_a_compiled_call_follows_use_backend():
    pytest.importorskip("triton")
    graphs = []

    def note(graph, _):
        graphs.append(str(graph.graph))
        return graph

    inputs = single(scan_inputs(time=20, key_dim=16, value_dim=16))
    compiled = torch.compile(flat_scan, fullgraph=True, backend=note)
    compiled(**inputs.arguments())
    with use_backend("triton"):
        compiled(**inputs.arguments())
    assert "memory_scan_triton" not in graphs[0]
    assert "memory_scan_triton" in graphs[1]


@without_shape_checks
def test_one_graph_serves_many_lengths():
    graphs = []

    def note(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(flat_scan, fullgraph=True, backend=note, dynamic=True)
    for time in (48, 64, 128):
        inputs = single(scan_inputs(time=time, key_dim=16, value_dim=16))
        for a, b in zip(flat_scan(**inputs.arguments()), compiled(**inputs.arguments()), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


def scan_arguments(case: str) -> tuple:
    inputs = single(scan_inputs(key_dim=16, value_dim=24, **dict(SCANS[case], time=16)))
    shape = inputs.tensors["alpha"].shape
    active = continues = None
    if inputs.mask is not None:
        active = inputs.mask[:, None].expand(shape).float()
        continues = torch.ones(shape)
    weight, momentum = inputs.state or (torch.zeros(*shape[:2], 16, 24) for _ in range(2))
    return (*inputs.tensors.values(), active, continues, weight, momentum, 16)


def mlp_arguments(name: str) -> tuple:
    plain = name == "plain"
    case = {} if plain else dict(documents=3, filled=(3, 0))
    inputs, weights, state = mlp_inputs(time=20, dim=16, heads=1, **case)
    inputs = single(inputs)
    state = state or initial_state(weights, 2, torch.float32)
    layers = [w.detach().float().requires_grad_() for group in (weights, *state[:3]) for w in group]
    return (*inputs.tensors.values(), state.filled, inputs.document_ids, None, layers, 16, 0.7, plain)


def divergence_arguments(case: str) -> tuple:
    q, k = torch.randn(2, 4, 6, 16, requires_grad=True), torch.randn(2, 2, 9, 16, requires_grad=True)
    masks = (None, None) if case == "plain" else (torch.rand(2, 6) < 0.5, torch.rand(2, 7) < 0.8)
    return (q, k, torch.randn(2, 3, 6, 16), torch.randn(2, 3, 8, 16), *masks, 0.3, 4, 2, 0.4, None, 1, True, "jsd")


@without_shape_checks
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("suffix", ["", "_triton"], ids=["torch", "triton"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("memory_scan", scan_arguments("plain")),
        ("memory_scan", scan_arguments("documents, padding and a state")),
        ("memory_mlp_scan", mlp_arguments("plain")),
        ("memory_mlp_scan", mlp_arguments("documents and a state")),
        ("attention_divergence", divergence_arguments("plain")),
        ("attention_divergence", divergence_arguments("masked")),
    ],
)
def test_operators_are_registered_as_they_must_be(name, arguments, suffix):
    if suffix:
        pytest.importorskip("triton")
    if name == "memory_mlp_scan" and not suffix:
        arguments = (*arguments, True)  # keep the tensors for the backward pass
    torch.library.opcheck(getattr(torch.ops.hybridmem, name + suffix).default, arguments)
