"""The tiled attention_divergence, compared with its definition on full maps."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybridmem_kernels import attention_divergence

chunked = importlib.import_module("hybridmem_kernels.attention_divergence.chunked")
chunked_blocks = importlib.import_module("hybridmem_kernels.attention_divergence.chunked_blocks")

CASES = {
    "plain": dict(),
    "one token": dict(queries=1, keys=1),
    "one token with persistent ones": dict(queries=1, keys=1, num_persistent=2, num_persistent_ref=1),
    "one query of many keys": dict(queries=1),
    "all queries": dict(queries=33),
    "grouped queries": dict(kv_heads=2),
    "one key for all heads": dict(kv_heads=1),
    "a window": dict(window=5, window_ref=5),
    "a window beside everything": dict(window=4, window_ref=None),
    "everything beside a window": dict(window_ref=4),
    "a window of itself": dict(window=1),
    "a window wider than the row": dict(window=100, window_ref=7),
    "persistent keys": dict(num_persistent=3, num_persistent_ref=3),
    "persistent keys on one side": dict(num_persistent=3, window=6, window_ref=None),
    "queries left out": dict(query_share=0.3),
    "no query": dict(query_share=0.0),
    "padding": dict(padded=True),
    "all at once": dict(
        kv_heads=2, window=9, window_ref=6, num_persistent=2, num_persistent_ref=1, query_share=0.5, padded=True
    ),
}


def random_inputs(
    queries=20,
    keys=33,
    heads=4,
    kv_heads=4,
    num_persistent=0,
    num_persistent_ref=0,
    query_share=None,
    padded=False,
    dtype=torch.float64,
    seed=0,
    **options,
):
    """Return arguments for three rows; the reference has more heads of another dimension, and strided keys."""
    g = torch.Generator().manual_seed(seed)
    query_mask = key_mask = None
    if query_share is not None:
        query_mask = torch.rand(3, queries, generator=g) < query_share
    if padded:
        key_mask = torch.rand(3, keys, generator=g) < 0.8
        key_mask[0, : keys // 3] = False  # left padding
        key_mask[1, -(keys // 3) :] = False  # right padding
        key_mask[2] = False  # only padding
    normal = dict(generator=g, dtype=torch.float64)
    tensors = dict(
        q=torch.randn(3, heads, queries, 8, **normal),
        k=torch.randn(3, kv_heads, num_persistent + keys, 8, **normal),
        q_ref=torch.randn(3, queries, 6, 5, **normal).transpose(1, 2),
        k_ref=torch.randn(3, num_persistent_ref + keys, 3, 5, **normal).transpose(1, 2),
    )
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors["q"].requires_grad_()
    tensors["k"].requires_grad_()
    masks = dict(query_mask=query_mask, key_mask=key_mask)
    return dict(tensors, **masks, num_persistent=num_persistent, num_persistent_ref=num_persistent_ref, **options)


def gradients(stats, inputs, seed=1):
    """Return the gradients of random sums of all differentiable outputs."""
    g = torch.Generator().manual_seed(seed)
    with_gradient = [stats.divergence, stats.entropy, stats.mass]
    cotangents = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype) for x in with_gradient]
    return torch.autograd.grad(with_gradient, [inputs["q"], inputs["k"]], cotangents)


def assert_equal_to_the_definition(inputs):
    expected = attention_divergence(**inputs, backend="reference")
    got = attention_divergence(**inputs)
    for name, a, b in zip(expected._fields, expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for name, a, b in zip("qk", gradients(expected, inputs), gradients(got, inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-10, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("tile", [2**18, 400], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("divergence", ["jsd", "kl", "reverse_kl"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_in_every_output_and_gradient(name, divergence, exclude_self, tile, monkeypatch):
    monkeypatch.setattr(chunked_blocks, "CPU_TILE", tile)
    assert_equal_to_the_definition(random_inputs(**CASES[name], divergence=divergence, exclude_self=exclude_self))


@pytest.mark.parametrize(
    "options",
    [
        dict(window=5, window_ref=5),
        dict(window=9, window_ref=6, kv_heads=2, num_persistent=2),
        dict(window=5, window_ref=4, padded=True),
        dict(window=5, window_ref=5, query_share=0.9),
        dict(window=5, window_ref=5, exclude_self=False, divergence="kl"),
    ],
)
def test_runs_of_a_window_that_are_worked_on_at_once(options, monkeypatch):
    """Most blocks of a long row contain several runs, each with its own band."""
    parts, blocks = [], chunked.cut_blocks
    monkeypatch.setattr(chunked_blocks, "LEAST_REACH", 3)
    monkeypatch.setattr(chunked_blocks, "CPU_TILE", 2000)
    monkeypatch.setattr(chunked, "cut_blocks", lambda *x: (parts.append(block.parts) or block for block in blocks(*x)))
    assert_equal_to_the_definition(random_inputs(queries=60, keys=67, **options))
    assert max(parts) > 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), keys=st.integers(1, 40), kv_heads=st.sampled_from([1, 2, 4]), padded=st.booleans())
def test_any_shape_equals_the_definition(data, keys, kv_heads, padded):
    window = st.none() | st.integers(1, keys + 2)
    inputs = random_inputs(
        queries=data.draw(st.integers(1, keys)),
        keys=keys,
        kv_heads=kv_heads,
        padded=padded,
        window=data.draw(window),
        window_ref=data.draw(window),
        num_persistent=data.draw(st.integers(0, 3)),
        num_persistent_ref=data.draw(st.integers(0, 3)),
        query_share=data.draw(st.none() | st.floats(0, 1)),
        exclude_self=data.draw(st.booleans()),
        divergence=data.draw(st.sampled_from(["jsd", "kl", "reverse_kl"])),
        seed=data.draw(st.integers(0, 99)),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_blocks, "CPU_TILE", data.draw(st.sampled_from([1, 300, 2000, 2**18])))
        patch.setattr(chunked_blocks, "LEAST_REACH", data.draw(st.sampled_from([1, 10, 128])))
        assert_equal_to_the_definition(inputs)


def stats_differ(one, other):
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_reference_has_the_window_of_the_policy_by_default(backend):
    inputs = random_inputs(window=5, backend=backend)
    default, same, other = (
        attention_divergence(**inputs, **given) for given in ({}, dict(window_ref="same"), dict(window_ref=None))
    )
    expected = attention_divergence(**inputs, window_ref=5)
    for stats in (default, same):
        for a, b in zip(expected, stats, strict=True):
            assert torch.equal(a, b)
    assert stats_differ(other, default)
    everything = attention_divergence(**dict(inputs, window=None))
    assert torch.equal(other.entropy_ref, everything.entropy_ref)


def test_a_policy_with_a_window_is_at_no_distance_from_itself_by_default():
    inputs = random_inputs(window=5, scale=0.7)
    inputs.update(q_ref=inputs["q"], k_ref=inputs["k"])
    stats = attention_divergence(**inputs)
    assert (stats.divergence == 0).all()
    assert torch.equal(stats.entropy, stats.entropy_ref)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_reference_has_the_scale_of_the_policy_by_default(backend):
    inputs = random_inputs(scale=0.7, backend=backend)
    expected = attention_divergence(**inputs, scale_ref=0.7)
    for a, b in zip(expected, attention_divergence(**inputs), strict=True):
        assert torch.equal(a, b)
    own = attention_divergence(**inputs, scale_ref=None)
    for a, b in zip(attention_divergence(**inputs, scale_ref=5**-0.5), own, strict=True):
        assert torch.equal(a, b)
    assert stats_differ(own, expected)


def test_each_side_has_a_scale_of_its_own_dimension_where_none_is_given():
    inputs = random_inputs()  # heads of dimension 8 and of dimension 5
    expected = attention_divergence(**inputs, scale=8**-0.5, scale_ref=5**-0.5)
    for how in ({}, dict(scale_ref=None), dict(scale_ref="same")):
        for a, b in zip(expected, attention_divergence(**inputs, **how), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("divergence", ["jsd", "kl", "reverse_kl"])
def test_gradcheck(divergence, backend):
    inputs = random_inputs(
        queries=4, keys=6, heads=2, kv_heads=1, num_persistent=1, window=4, window_ref=None, padded=True
    )

    def stats(q, k):
        out = attention_divergence(**dict(inputs, q=q, k=k), divergence=divergence, backend=backend)
        return out.divergence, out.entropy, out.mass

    assert torch.autograd.gradcheck(stats, (inputs["q"], inputs["k"]), fast_mode=True)


def test_two_keys_by_hand():
    """At the third query, p = (1/4, 3/4) and p_ref = (1/2, 1/2); the query itself has half of the attention."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([1.0, 3.0, 4.0], dtype=torch.float64).log().view(1, 1, 3, 1)
    inputs = dict(q=q, k=k, q_ref=q, k_ref=torch.zeros_like(k), scale=1.0)
    stats = attention_divergence(**inputs)
    jsd = 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5))
    assert stats.jsd.item() == pytest.approx(jsd, abs=1e-12)
    assert stats.entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), abs=1e-12)
    assert stats.entropy_ref.item() == pytest.approx(math.log(2), abs=1e-12)
    assert stats.mass.item() == pytest.approx(0.5, abs=1e-12)
    kl = attention_divergence(**inputs, divergence="kl").divergence
    reverse_kl = attention_divergence(**inputs, divergence="reverse_kl").divergence
    assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-12)
    assert reverse_kl.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_policy_is_at_no_distance_from_itself_and_is_not_pulled(dtype):
    inputs = random_inputs(dtype=dtype, window=9, num_persistent=2)
    inputs.update(q_ref=inputs["q"], k_ref=inputs["k"], window_ref=9, num_persistent_ref=2)
    stats = attention_divergence(**inputs)
    assert (stats.divergence == 0).all()
    assert torch.equal(stats.entropy, stats.entropy_ref)
    for grad in torch.autograd.grad(stats.divergence.sum(), [inputs["q"], inputs["k"]]):
        assert (grad == 0).all()


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
def test_kl_of_a_policy_with_itself(divergence):
    inputs = random_inputs()
    inputs.update(q_ref=inputs["q"], k_ref=inputs["k"])
    stats = attention_divergence(**inputs, divergence=divergence)
    assert stats.divergence.abs().max() < 1e-12
    for grad in torch.autograd.grad(stats.divergence.sum(), [inputs["q"], inputs["k"]]):
        assert grad.abs().max() < 1e-12


def test_small_distances_keep_their_digits_in_float32():
    inputs = random_inputs(queries=33, dtype=torch.float32)
    nudge = 1e-3 * torch.randn_like(inputs["k"])
    inputs.update(q_ref=inputs["q"], k_ref=inputs["k"] + nudge)
    precise = attention_divergence(
        **{name: x.double() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    ).divergence
    assert 1e-9 < precise[:, 5:].median() < 1e-5
    got = attention_divergence(**inputs).divergence
    assert (got >= 0).all()
    torch.testing.assert_close(got[:, 5:].double(), precise[:, 5:], rtol=1e-2, atol=1e-10)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 100.0, 1e4])
def test_bounds(sharpness):
    inputs = random_inputs(queries=33, dtype=torch.float32, scale=sharpness, scale_ref=sharpness)
    stats = attention_divergence(**inputs)
    keys = torch.arange(33).clamp(min=1)
    assert (stats.divergence >= 0).all()
    assert (stats.divergence <= math.log(2) + 1e-5).all()
    for entropy in (stats.entropy, stats.entropy_ref):
        assert (entropy >= -1e-5).all()
        assert (entropy <= keys.log() + 1e-5).all()
    assert ((stats.mass >= 0) & (stats.mass <= 1 + 1e-5)).all()
    assert all((x[:, 0] == 0).all() for x in stats)  # the first token has no earlier tokens


def test_policies_that_look_at_other_keys_are_ln_2_apart():
    k = torch.tensor([60.0, -60.0, 0.0]).view(1, 1, 3, 1)
    q = torch.ones(1, 1, 1, 1).requires_grad_()
    inputs = dict(q=q, k=k, q_ref=torch.ones(1, 1, 1, 1), k_ref=-k, scale=1.0)
    stats = attention_divergence(**inputs)
    assert stats.jsd.item() == pytest.approx(math.log(2), abs=1e-6)
    for divergence in ("kl", "reverse_kl"):
        value = attention_divergence(**inputs, divergence=divergence).divergence
        assert value.item() == pytest.approx(-math.log(1e-8), rel=1e-5)  # the floor
        assert torch.autograd.grad(value.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_worked_on_in_float32(dtype):
    inputs = random_inputs(queries=33, dtype=dtype, window=12, window_ref=None, num_persistent=2)
    stats = attention_divergence(**inputs)
    double = dict(inputs)
    for name in ("q", "k", "q_ref", "k_ref"):
        double[name] = inputs[name].detach().double().requires_grad_()
    expected = attention_divergence(**double, backend="reference")
    for a, b in zip(expected, stats, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b.double(), a, rtol=0, atol=1e-5)
    for a, b in zip(gradients(expected, double), gradients(stats, inputs), strict=True):
        assert b.dtype == dtype
        torch.testing.assert_close(b.double(), a, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["jsd", "kl", "reverse_kl"])
def test_huge_scores_stay_finite(dtype, divergence):
    inputs = random_inputs(queries=33, dtype=dtype, num_persistent=2, window=8, window_ref=None, divergence=divergence)
    for name in ("q", "k", "q_ref", "k_ref"):
        inputs[name] = (inputs[name].detach() * 500).requires_grad_()
    stats = attention_divergence(**inputs)
    assert all(x.isfinite().all() for x in stats)
    loss = (stats.divergence + stats.entropy + stats.mass).sum() * 1e-3
    for grad in torch.autograd.grad(loss, [inputs["q"], inputs["k"]]):
        assert grad.isfinite().all()


def test_a_vanishing_mass_still_has_a_distribution():
    """A query with weight e^-200 on all earlier tokens, which underflows in float32, still has a normalised p."""
    k = torch.tensor([0.0, math.log(3), 200.0]).view(1, 1, 3, 1)
    q = torch.ones(1, 1, 1, 1)
    stats = attention_divergence(q, k, q, k, scale=1.0)
    assert stats.mass.item() == 0
    assert stats.entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), abs=1e-4)


def test_autocast_changes_nothing():
    inputs = random_inputs(dtype=torch.float32)
    expected, by_definition = attention_divergence(**inputs), attention_divergence(**inputs, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, under_autocast = attention_divergence(**inputs), attention_divergence(**inputs, backend="reference")
        grads = gradients(got, inputs)
    for pairs in ((expected, got), (by_definition, under_autocast), (gradients(expected, inputs), grads)):
        for a, b in zip(*pairs, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_reference_is_a_constant(backend):
    inputs = random_inputs(backend=backend)
    for name in ("q_ref", "k_ref"):
        inputs[name].requires_grad_()
    stats = attention_divergence(**inputs)
    assert not stats.entropy_ref.requires_grad
    stats.divergence.sum().backward()
    assert inputs["q_ref"].grad is None
    assert inputs["k_ref"].grad is None
    assert inputs["q"].grad is not None


def test_a_masked_query_costs_nothing_and_moves_nothing():
    inputs = random_inputs(query_share=0.3)
    mask = inputs["query_mask"]
    stats = attention_divergence(**inputs)
    everything = attention_divergence(**dict(inputs, query_mask=None))
    for a, b in zip(everything, stats, strict=True):
        torch.testing.assert_close(b, a.where(mask, 0), rtol=0, atol=1e-12)
    grad_q, _ = gradients(stats, inputs)
    assert (grad_q.transpose(1, 2)[~mask] == 0).all()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_row_reads_as_it_does_alone(padding):
    alone = random_inputs(queries=12, keys=20, num_persistent=2, window=7, window_ref=None)
    stats = attention_divergence(**alone)
    ends = (0, 0, 5, 0) if padding == "left" else (0, 0, 0, 5)
    padded = dict(alone)
    for name in ("q", "q_ref"):
        padded[name] = torch.nn.functional.pad(alone[name], ends)
    for name, front in (("k", 2), ("k_ref", 0)):
        persistent, keys = alone[name].split((front, 20), dim=2)
        padded[name] = torch.cat((persistent, torch.nn.functional.pad(keys, ends, value=3.0)), dim=2)
    real = slice(5, None) if padding == "left" else slice(None, -5)
    mask = torch.zeros(3, 25, dtype=torch.bool)
    mask[:, real] = True
    got = attention_divergence(**dict(padded, key_mask=mask, query_mask=mask[:, -17:] if padding == "left" else None))
    for a, b in zip(stats, got, strict=True):
        torch.testing.assert_close(b[:, real], a, rtol=0, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Dispatch mode that records the largest tensor among the outputs of all operators."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("options", [dict(), dict(window=64, window_ref=64)], ids=["everything", "window"])
def test_no_map_is_held(options):
    largest = {}
    for time in (1024, 2048):
        tensors = [torch.randn(1, 4, time, 16, requires_grad=True) for _ in range(4)]
        with LargestTensor() as mode:
            stats = attention_divergence(*tensors, **options)
            (stats.divergence + stats.entropy + stats.mass).sum().backward()
        largest[time] = mode.numel
        assert mode.numel < time * time / 2
    assert largest[2048] <= 2.1 * largest[1024]


def test_only_inputs_and_two_numbers_per_query_and_head_are_saved():
    saved = []
    inputs = random_inputs(queries=33)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attention_divergence(**inputs)
    given_elements = sum(inputs[name].numel() for name in ("q", "k", "q_ref", "k_ref"))
    assert sum(saved) <= given_elements + 3 * 33 * 2 * (4 + 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(divergence="js"), "divergence='js' is unknown; choose one of jsd"),
        (dict(backend="cuda"), "backend='cuda' does not exist"),
        (dict(window=0), "window must be at least 1"),
        (dict(window_ref=-1), "window_ref must be at least 1"),
        (dict(window=-1), "window must be at least 1"),
        (dict(window_ref="none"), "window_ref"),
        (dict(scale_ref="own"), "scale_ref"),
        (dict(num_persistent=-1), "num_persistent must be at least 0"),
        (dict(num_persistent=3), "k and k_ref must hold equally many keys after their persistent ones, got 30 and 33"),
        (dict(num_persistent_ref=20), "k_ref must hold num_persistent_ref=20 columns and a key for each of the 20"),
        (dict(k=torch.zeros(3, 3, 33, 8)), "the heads of q must be a multiple of k's heads, got 4 and 3"),
        (dict(q_ref=torch.zeros(3, 6, 19, 5)), "'q_ref'|q_ref must have the batch and queries of q"),
        (dict(key_mask=torch.ones(3, 20, dtype=torch.bool)), r"key_mask must be \(batch, 33\)"),
        (dict(k=torch.zeros(3, 4, 33, 8, device="meta")), "k is on meta but q is on cpu"),
    ],
)
def test_bad_settings_are_named(change, message):
    inputs = random_inputs()
    with pytest.raises((ValueError, TypeError), match=message):
        attention_divergence(**{**inputs, **change})
