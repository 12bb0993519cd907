"""Triton kernels of memory_mlp_scan in the interpreter, compared with the token-by-token definition."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hybridmem_kernels.memory_mlp_scan.reference import MemoryMLPState, initial_state, memory_mlp_scan_reference

from .inputs import ScanInputs, scan_inputs

pytest.importorskip("triton")
from hybridmem_kernels.memory_mlp_scan import triton_autograd
from hybridmem_kernels.memory_mlp_scan.triton_autograd import builds, memory_mlp_scan_triton

CASES = {
    "one token": dict(time=1, dim=16),
    "one over a chunk": dict(time=17, dim=24, heads=2),
    "chunk of two tiles": dict(time=40, chunk_size=64, dim=16),
    "chunk of no power of two": dict(time=41, chunk_size=40, dim=16, max_grad_norm=0.5),
    "bounded gradients": dict(time=20, max_grad_norm=0.7, dim=16),
    "deep": dict(time=20, depth=4, dim=16, max_grad_norm=0.5),
    "wide": dict(time=18, dim=48, hidden=(80,)),
    "hidden layers of different widths": dict(time=17, dim=16, hidden=(40, 24), filled=(3,)),
    "given state in an open chunk": dict(time=24, dim=16, batch=2, filled=(5, 0)),
    "open chunk that stays open": dict(time=5, dim=16, batch=2, filled=(3, 0), max_grad_norm=0.7),
    "documents on a chunk's edge and inside": dict(time=37, dim=16, boundaries=(16, 20), filled=(7,)),
    "documents and padding": dict(time=30, dim=16, batch=2, documents=3, padded=True, filled=(0, 9)),
    "gates at their ends": dict(time=30, dim=16, extreme_gates=True),
}


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Fill scratch memory with NaN, which exposes reads before writes."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)


def mlp_case(
    depth=2, hidden=None, filled=None, dim=16, batch=1, heads=1, chunk_size=16, max_grad_norm=None, dtype=None, **case
) -> tuple[ScanInputs, tuple[Tensor, ...], MemoryMLPState, tuple[int, float | None]]:
    inputs = scan_inputs(key_dim=dim, value_dim=dim, batch=batch, heads=heads, dtype=torch.float32, **case)
    if dtype is not None:
        inputs.tensors = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.tensors.items()}
    g = torch.Generator().manual_seed(1)
    shapes = list(pairwise([dim, *(hidden or [dim] * (depth - 1)), dim]))

    def matrices(*lead):
        return tuple((torch.randn(*lead, *s, generator=g) * 0.3).requires_grad_() for s in shapes)

    weights = matrices(heads)
    if filled is None:
        state = initial_state(weights, batch, torch.float32)
    else:
        state = MemoryMLPState(*(matrices(batch, heads) for _ in range(3)), torch.tensor(filled))
    return inputs, weights, state, (chunk_size, max_grad_norm)


def outputs_and_gradients(scan, inputs, weights, state, settings):
    leaves = [*inputs.tensors.values(), *weights]
    leaves += [w for layers in state[:3] for w in layers if w.is_leaf and w.requires_grad]
    out, end = scan(*inputs.tensors.values(), weights, state, inputs.document_ids, inputs.mask, *settings)
    open_chunk = (end.filled > 0)[:, None, None, None]  # anchors matter only inside an open chunk
    outputs = [out * inputs.valid(), *end.weights, *end.momenta, *(a * open_chunk for a in end.anchors)]
    g = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(x.shape, generator=g).to(x.dtype) for x in outputs]
    grads = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    grads = [torch.zeros_like(leaf) if x is None else x for leaf, x in zip(leaves, grads, strict=True)]
    return outputs, grads, end.filled


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = 1 + expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_in_every_output_and_gradient(name):
    case = mlp_case(**CASES[name])
    expected, expected_grads, expected_filled = outputs_and_gradients(memory_mlp_scan_reference, *case)
    got, got_grads, filled = outputs_and_gradients(memory_mlp_scan_triton, *case)
    assert torch.equal(filled, expected_filled)
    for a, b in zip([*got, *got_grads], [*expected, *expected_grads], strict=True):
        assert_near(a, b, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_tokens_keep_a_float32_state(dtype, tolerance):
    case = mlp_case(time=20, dim=16, max_grad_norm=0.7, dtype=dtype)
    expected, expected_grads, _ = outputs_and_gradients(memory_mlp_scan_reference, *case)
    got, got_grads, _ = outputs_and_gradients(memory_mlp_scan_triton, *case)
    assert got[0].dtype == dtype
    assert [x.dtype for x in got[1:]] == [torch.float32] * (len(got) - 1)
    assert [x.dtype for x in got_grads] == [x.dtype for x in expected_grads]
    assert_near(got[0], expected[0], tolerance)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert_near(a, b, 1e-5)
    for a, b in zip(got_grads, expected_grads, strict=True):
        assert_near(a, b, tolerance)


def test_streaming_moves_no_chunk():
    inputs, weights, state, settings = mlp_case(time=40, dim=16, max_grad_norm=0.9)
    whole, end = memory_mlp_scan_triton(*inputs.tensors.values(), weights, state, None, None, *settings)
    parts, start = [], 0
    for length in (17, 1, 22):
        part = inputs.slice(start, start + length).tensors.values()
        out, state = memory_mlp_scan_triton(*part, weights, state, None, None, *settings)
        parts.append(out)
        start += length
    assert_near(torch.cat(parts, dim=2), whole, 1e-5)
    for a, b in zip(state.weights, end.weights, strict=True):
        assert_near(a, b, 1e-5)


def test_any_strides_and_an_expanded_gradient():
    inputs, weights, state, settings = mlp_case(time=8, dim=16, heads=2)
    arguments = (weights, state, None, None, *settings)
    contiguous = list(inputs.tensors.values())
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in contiguous]
    strided[2] = contiguous[2].detach().mT.contiguous().mT.requires_grad_()
    results = []
    for tensors in (contiguous, strided):
        out, _ = memory_mlp_scan_triton(*tensors, *arguments)
        results.append((out, *torch.autograd.grad(out.sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_no_tokens():
    inputs, weights, state, settings = mlp_case(time=2, filled=(2,))
    nothing = inputs.slice(0, 0).tensors.values()
    out, end = memory_mlp_scan_triton(*nothing, weights, state, None, None, *settings)
    assert out.shape == (1, 1, 0, 16)
    assert end.weights is state.weights


@pytest.mark.parametrize("filled", [0, 2])
def test_nothing_but_padding_changes_nothing(filled):
    inputs, weights, state, settings = mlp_case(time=4, dim=16, filled=(filled,))
    mask = torch.zeros(1, 4, dtype=torch.bool)
    out, end = memory_mlp_scan_triton(*inputs.tensors.values(), weights, state, None, mask, *settings)
    assert not out.any()
    for a, b in zip(end[:3], state[:3], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(end.filled, state.filled)


def test_one_state_a_chunk_is_kept_for_the_backward():
    time, dim, chunk_size = 64, 32, 16
    inputs, weights, state, settings = mlp_case(time=time, dim=dim, chunk_size=chunk_size)
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        memory_mlp_scan_triton(*inputs.tensors.values(), weights, state, None, None, *settings)
    states = (time // chunk_size + 2) * 2 * 2 * dim**2  # starts of chunks, the end and the given anchors
    assert sum(saved.values()) <= states + 3 * time * (dim + 1)


@pytest.mark.parametrize("dim", [16, 64])  # narrow and wide tiles
def test_every_launch_is_among_the_builds(monkeypatch, dim):
    launched = []
    launch = triton_autograd._launch

    def record(kernel, grid, work, call):
        made = (f(kernel, call.shape, call.half, "cuda") for f in (triton_autograd.constexprs, triton_autograd.options))
        launched.append((kernel, *made))
        launch(kernel, grid, work, call)

    monkeypatch.setattr(triton_autograd, "_launch", record)
    inputs, weights, state, settings = mlp_case(time=3, dim=dim, dtype=torch.bfloat16)
    out, _ = memory_mlp_scan_triton(*inputs.tensors.values(), weights, state, None, None, *settings)
    out.sum().backward()
    built = builds((dim, dim, dim), 16, torch.bfloat16)
    assert len({build.name for build in built}) == len(built)
    options = [
        {
            name: getattr(build, name)
            for name in ("num_warps", "num_stages", "maxnreg")
            if getattr(build, name) is not None
        }
        for build in built
    ]
    for kernel, constants, chosen in launched:
        matches = [
            option
            for build, option in zip(built, options, strict=True)
            if build.kernel is kernel and constants.items() <= build.constexprs.items()
        ]
        assert chosen in matches
    assert {build.kernel for build in built} == {kernel for kernel, *_ in launched}
    assert all(set(build.signature) == set(build.kernel.arg_names) for build in built)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=torch.float64), "float32, bfloat16 and float16, got torch.float64"),
        (dict(chunk_size=8), "chunk_size of 16 to 128, got 8"),
        (dict(chunk_size=256), "chunk_size of 16 to 128, got 256"),
        (dict(dim=8), "dim of 16 to 256, got 8"),
        (dict(hidden=(1040,)), "hidden layers as wide as 16 to 1024, got 1040"),
    ],
)
def test_limits_are_named_before_anything_runs(change, message):
    inputs, weights, state, settings = mlp_case(time=2, **change)
    with pytest.raises(ValueError, match=message):
        memory_mlp_scan_triton(*inputs.tensors.values(), weights, state, None, None, *settings)
