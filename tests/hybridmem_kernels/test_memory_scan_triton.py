"""memory_scan in Triton's interpreter, compared with its token-by-token definition."""

import pytest
import torch

pytest.importorskip("triton")

from hybridmem_kernels.memory_scan import triton_autograd, triton_decode
from hybridmem_kernels.memory_scan.reference import MemoryState, memory_scan_reference

from .inputs import ScanInputs, scan_inputs

CASES = {
    "one token": dict(time=1, chunk_size=16),
    "one over a chunk": dict(time=17, chunk_size=16, heads=2),
    "dims 24 and 48": dict(time=20, chunk_size=23, key_dim=24, value_dim=48),
    "dims 80 and 16": dict(time=33, chunk_size=32, key_dim=80),
    "documents on a chunk's edge and inside": dict(time=35, chunk_size=16, boundaries=(16, 17, 25)),
    "documents and padding": dict(time=20, batch=2, chunk_size=16, documents=3, padded=True),
    "padding": dict(time=17, batch=2, chunk_size=16, padded=True),
    "gates at their ends": dict(time=20, chunk_size=16, extreme_gates=True),
    "chunks of 64": dict(time=70, chunk_size=64),
    "a checkpoint every other chunk": dict(time=150, chunk_size=128, boundaries=(64, 70)),
}


@pytest.fixture(autouse=True)
def _scratch_is_poisoned(monkeypatch):
    """Fill scratch memory with NaN, which no mask hides."""

    def poisoned(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def inputs_of(dtype=torch.float32, **case) -> ScanInputs:
    settings = dict(batch=1, heads=1, key_dim=16, value_dim=16, given_state=True)
    inputs = scan_inputs(**{**settings, **case}, dtype=torch.float32)
    tensors = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.tensors.items()}
    return ScanInputs(tensors, inputs.state, inputs.document_ids, inputs.mask)


def doubled(inputs: ScanInputs) -> ScanInputs:
    """Return the same values in float64."""
    tensors = {name: x.detach().double().requires_grad_() for name, x in inputs.tensors.items()}
    state = MemoryState(*(x.detach().double().requires_grad_() for x in inputs.state))
    return ScanInputs(tensors, state, inputs.document_ids, inputs.mask)


def scan(inputs, *chunk_size):
    run = triton_autograd.memory_scan_triton if chunk_size else memory_scan_reference
    out, state = run(*inputs.tensors.values(), inputs.state, inputs.document_ids, inputs.mask, *chunk_size)
    return out, *state


def assert_equals_the_definition(inputs, chunk_size, tolerance):
    twin = doubled(inputs)
    expected, got = scan(twin), scan(inputs, chunk_size)
    assert got[0].dtype == inputs.tensors["v"].dtype
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=tolerance, atol=tolerance)
    g = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(x.shape, generator=g).to(x.dtype) for x in got]
    grads = (
        torch.autograd.grad(expected, twin.leaves(), [x.double() for x in cotangents]),
        torch.autograd.grad(got, inputs.leaves(), cotangents),
    )
    for name, leaf, a, b in zip(inputs.leaf_names(), inputs.leaves(), *grads, strict=True):
        assert b.dtype == leaf.dtype
        scale = tolerance * max(1.0, float(a.abs().max()))
        message = lambda m, name=name: f"gradient of {name}: {m}"  # noqa: E731
        torch.testing.assert_close(b.double(), a, rtol=0, atol=scale, msg=message)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_in_every_output_and_gradient(name):
    case = dict(CASES[name])
    chunk_size = case.pop("chunk_size")
    assert_equals_the_definition(inputs_of(**case), chunk_size, 5e-6)


@pytest.mark.parametrize(("gate", "value"), [("alpha", 0.0), ("alpha", 1.0), ("eta", 0.0), ("theta", 0.0)])
def test_constant_gates_are_exact(gate, value):
    inputs = inputs_of(time=17)
    with torch.no_grad():
        inputs.tensors[gate].fill_(value)
    assert_equals_the_definition(inputs, 16, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_accumulate_in_float32(dtype):
    inputs = inputs_of(time=20, dtype=dtype)
    assert_equals_the_definition(inputs, 16, 4 * torch.finfo(dtype).eps)
    assert scan(inputs, 16)[1].dtype == torch.float32


def test_queries_and_keys_may_be_more_precise_than_values():
    inputs = inputs_of(time=17)
    inputs.tensors["v"] = inputs.tensors["v"].detach().bfloat16().requires_grad_()
    assert_equals_the_definition(inputs, 16, 4 * torch.finfo(torch.bfloat16).eps)


def test_inputs_may_lie_as_projections_leave_them():
    """Inputs are views of (batch, time, heads · dim): `v` has gaps, `k` and `q` differ, and one `eta` is expanded."""
    inputs = inputs_of(time=17, heads=2)
    constant = inputs.tensors["eta"].detach()[:, :, :1].expand(-1, -1, 17)
    inputs.tensors["eta"] = constant.contiguous()
    lying = {name: x.detach().transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.tensors.items()}
    lying["k"] = inputs.tensors["k"].detach()
    lying["v"] = torch.cat((lying["v"], lying["v"]), dim=-1)[..., :16]
    lying = ScanInputs({**{name: x.requires_grad_() for name, x in lying.items()}, "eta": constant}, inputs.state)
    results = []
    for x in (inputs, lying):
        out, weight, _ = scan(x, 16)
        results.append((out, weight, *torch.autograd.grad(out.square().sum(), [x.tensors[name] for name in "qkv"])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


def test_a_loss_on_the_state_alone_has_gradients():
    inputs = inputs_of(time=17)
    twin = doubled(inputs)
    leaves = ("k", "v", "theta")
    grads = [
        torch.autograd.grad(result[1].square().sum(), [x.tensors[name] for name in leaves])
        for x, result in ((twin, scan(twin)), (inputs, scan(inputs, 16)))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoding_step_equals_the_definition(padded, dtype):
    inputs = inputs_of(time=2, batch=3, heads=2, key_dim=24, value_dim=40, dtype=dtype).slice(1, 2)
    inputs.state = MemoryState(*(torch.randn(3, 2, 24, 40) for _ in range(2)))
    inputs.mask = torch.tensor([[True], [False], [True]]) if padded else None
    before = [x.clone() for x in inputs.state]
    expected = scan(doubled(inputs))
    out, state = triton_decode.memory_step_triton(*inputs.tensors.values(), inputs.state, inputs.mask)
    assert not out.requires_grad
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected[0], rtol=tolerance, atol=tolerance)
    for a, b, old, given in zip(expected[1:], state, before, inputs.state, strict=True):
        torch.testing.assert_close(b.double(), a, rtol=0, atol=1e-6)
        assert torch.equal(given, old)


def test_steps_go_on_where_a_scan_ends(monkeypatch):
    calls = []
    step = triton_autograd.memory_step_triton
    monkeypatch.setattr(triton_autograd, "memory_step_triton", lambda *x: calls.append(1) or step(*x))
    inputs = inputs_of(time=19, heads=2)
    with torch.no_grad():
        whole = scan(inputs, 16)
        part = inputs.slice(0, 17)
        part.state = inputs.state
        out, *state = scan(part, 16)
        parts = [out]
        for t in (17, 18):
            part = inputs.slice(t, t + 1)
            part.state = MemoryState(*state)
            out, *state = scan(part, 16)
            parts.append(out)
    assert len(calls) == 2
    for a, b in zip(whole, (torch.cat(parts, dim=2), *state), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)


def test_one_token_with_gradients_is_a_scan(monkeypatch):
    monkeypatch.setattr(triton_autograd, "memory_step_triton", None)
    assert scan(inputs_of(time=1), 16)[0].requires_grad


def test_one_state_per_chunk_is_kept_for_the_backward():
    time, dim, chunk_size = 256, 16, 128
    inputs = inputs_of(time=time)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan(inputs, chunk_size)
    kept = {x.data_ptr(): x.numel() for x in saved if x.data_ptr() not in {y.data_ptr() for y in inputs.leaves()}}
    # Checkpoints, errors, and up to a dozen gates per token.
    assert sum(kept.values()) <= time * (dim + 12) + (time // chunk_size) * 2 * dim**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(key_dim=8), "key_dim from 16 to 256, got 8"),
        (dict(value_dim=257), "value_dim from 16 to 256, got 257"),
        (dict(chunk_size=8), "chunk_size from 16 to 128, got 8"),
        (dict(chunk_size=256), "chunk_size from 16 to 128, got 256"),
        (dict(dtype=torch.float64), "q is torch.float64"),
    ],
)
def test_unsupported_inputs_are_named(change, message):
    chunk_size = change.pop("chunk_size", 16)
    with pytest.raises(ValueError, match=message):
        scan(inputs_of(time=2, **change), chunk_size)


def test_a_step_takes_one_token():
    inputs = inputs_of(time=2)
    with pytest.raises(ValueError, match="takes one token, got 2"):
        triton_decode.memory_step_triton(*inputs.tensors.values(), inputs.state)


@pytest.mark.parametrize(("chunk_size", "restores"), [(16, 0), (64, 0), (128, 1)])
def test_builds_name_every_argument(chunk_size, restores):
    listed = triton_autograd.builds(8, 12, 4096, 64, 64, torch.bfloat16, chunk_size)
    names = [build.name for build in listed]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("restore_kernel") for name in names) == restores
    for build in listed:
        assert list(build.signature) == build.kernel.arg_names
        assert {name for name, kind in build.signature.items() if kind == "constexpr"} == set(build.constexprs)


def test_launches_use_the_built_kernels(monkeypatch):
    launches = []
    run = triton_autograd.Launch.run
    monkeypatch.setattr(triton_autograd.Launch, "run", lambda launch: launches.append(launch) or run(launch))
    scan(inputs_of(time=17), 16)[0].sum().backward()
    listed = triton_autograd.builds(1, 1, 17, 16, 16, torch.float32, 16)

    def compiled_as(x):
        constants = {name: value for name, value in x.constexprs.items() if name not in ("PRECISION", "EXACT")}
        return x.kernel.__name__, constants, x.num_warps

    built = [compiled_as(build) for build in listed]
    assert all(compiled_as(launch) in built for launch in launches)
    assert len(launches) == 4 + 7
