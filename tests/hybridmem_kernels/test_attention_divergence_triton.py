"""attention_divergence in Triton's interpreter, compared with its definition."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from hybridmem_kernels.attention_divergence import triton_autograd
from hybridmem_kernels.attention_divergence.reference import AttentionPolicy, attention_divergence_reference
from hybridmem_kernels.attention_divergence.triton_plan import Plan, Tiles

# Kernels compute log(0) and exponentials of masked scores before they select, which makes NumPy warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WITH_GRADIENT = ("divergence", "entropy", "mass")
SMALL = Tiles(rows=16, columns=16, chunk=16, num_warps=4, num_stages=1)


@pytest.fixture
def small_tiles(monkeypatch):
    """Use small tiles, so that short rows have partial tiles."""
    monkeypatch.setattr(Plan, "tiles", property(lambda plan: SMALL))


def policy(
    queries=6, keys=9, batch=1, heads=2, kv_heads=1, dim=8, window=None, persistent=0, dtype=torch.float32, seed=0
):
    """Return random queries and keys; the keys are strided like the output of a projection."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, dim, generator=g)
    k = torch.randn(batch, persistent + keys, kv_heads, dim, generator=g).transpose(1, 2)
    q, k = (x.to(dtype).requires_grad_() for x in (q, k))
    return AttentionPolicy(q, k, dim**-0.5, window, persistent)


def compare(one, other, divergence="jsd", exclude_self=True, query_mask=None, key_mask=None):
    other = other._replace(q=other.q.detach(), k=other.k.detach())
    return triton_autograd.attention_divergence_triton(one, other, query_mask, key_mask, exclude_self, divergence)


def define(one, other, divergence="jsd", exclude_self=True, query_mask=None, key_mask=None):
    """Compute the definition in float64 on the exact inputs of the kernels."""
    q, k = (x.detach().double().requires_grad_() for x in one[:2])
    one = one._replace(q=q, k=k)
    other = other._replace(q=other.q.detach().double(), k=other.k.detach().double())
    return one, attention_divergence_reference(one, other, query_mask, key_mask, exclude_self, divergence)


def gradients(stats, one):
    """Return the gradients of random sums of all differentiable outputs."""
    g = torch.Generator().manual_seed(1)
    outputs = [getattr(stats, name) for name in WITH_GRADIENT]
    cotangents = [torch.randn(x.shape, generator=g).to(x.dtype) for x in outputs]
    return torch.autograd.grad(outputs, one[:2], cotangents)


def assert_equal_to_the_definition(one, other, atol=5e-6, rtol=0.0, **settings):
    twin, expected = define(one, other, **settings)
    stats = compare(one, other, **settings)
    for name, a, b in zip(expected._fields, expected, stats, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(b.double(), a, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    for name, x, a, b in zip("qk", one[:2], gradients(expected, twin), gradients(stats, one), strict=True):
        assert b.dtype == x.dtype
        torch.testing.assert_close(b.double(), a, rtol=rtol, atol=atol, msg=lambda m, name=name: f"d{name}: {m}")


def mask(*shape, share=0.7, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("divergence", ["jsd", "kl", "reverse_kl"])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_equals_the_definition_in_every_output_and_gradient(divergence, exclude_self):
    settings = dict(divergence=divergence, exclude_self=exclude_self)
    assert_equal_to_the_definition(policy(persistent=2), policy(heads=3, kv_heads=3, dim=5, seed=1), **settings)


CASES = {
    "everything": (dict(), dict()),
    "a window": (dict(window=9), dict(window=9)),
    "a window beside everything": (dict(window=5), dict()),
    "everything beside a window": (dict(), dict(window=20)),
    "a window of itself": (dict(window=1), dict(window=3)),
    "persistent keys": (dict(persistent=3), dict(persistent=17)),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_many_tiles(name, small_tiles):
    """19 queries at the end of 37 keys align with no tile."""
    one, other = CASES[name]
    shape = dict(queries=19, keys=37, heads=1)
    assert_equal_to_the_definition(policy(**shape, **one), policy(**shape, **other, seed=1))


def test_all_at_once(small_tiles, monkeypatch):
    """Two rows, grouped queries and slabs of one block; the second row's mask removes whole blocks."""
    monkeypatch.setattr(triton_autograd, "SLAB", 0)
    shape = dict(batch=2, queries=35, keys=37)
    query_mask, key_mask = mask(2, 35), mask(2, 37, seed=1)
    query_mask[1, :17] = False
    query_mask[1, 20:] = False
    key_mask[0, :12] = False  # left padding
    one = policy(**shape, window=11, persistent=2)
    other = policy(**shape, heads=1, dim=5, window=6, persistent=1, seed=1)
    assert_equal_to_the_definition(one, other, query_mask=query_mask, key_mask=key_mask)


@pytest.mark.parametrize(("dim", "dim_ref"), [(24, 48), (80, 16)])
def test_dimensions_between_powers_of_two(dim, dim_ref):
    assert_equal_to_the_definition(policy(dim=dim), policy(dim=dim_ref, seed=1))


def test_chunks_of_a_head(monkeypatch):
    """Scores are summed over a few dimensions at a time, and the last chunk extends beyond the head."""
    monkeypatch.setattr(Plan, "tiles", property(lambda plan: SMALL._replace(chunk=16)))
    assert_equal_to_the_definition(policy(dim=40), policy(dim=24, seed=1))


@pytest.mark.parametrize("queries", [0, 1])
def test_rows_with_nothing_to_compare(queries):
    one, other = policy(queries=queries, keys=queries, persistent=1), policy(queries=queries, keys=queries, seed=1)
    stats = compare(one, other)
    assert all(x.shape == (1, queries) and (x == 0).all() for x in stats)
    assert all((x == 0).all() for x in gradients(stats, one))


def test_nothing_but_padding_or_masked_queries():
    one, other = policy(), policy(seed=1)
    for settings in (dict(query_mask=mask(1, 6, share=0)), dict(key_mask=mask(1, 9, share=0))):
        stats = compare(one, other, **settings)
        assert all((x == 0).all() for x in stats)
        assert all((x == 0).all() for x in gradients(stats, one))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    one, other = policy(dtype=dtype, persistent=1), policy(dtype=dtype, seed=1)
    assert_equal_to_the_definition(one, other, atol=1e-5, rtol=2 * torch.finfo(dtype).eps)


def test_each_policy_has_its_own_dtype():
    one, other = policy(dtype=torch.bfloat16), policy(seed=1)
    mixed = one._replace(k=one.k.detach().float().requires_grad_())
    assert_equal_to_the_definition(mixed, other, atol=1e-5, rtol=1e-2)


def test_unwritten_scratch_is_never_read(small_tiles, monkeypatch):
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(make):
        def poison(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return poison

    monkeypatch.setattr(torch, "empty", poisoned(empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    query_mask = torch.ones(1, 35, dtype=torch.bool)
    query_mask[0, 14:33] = False
    shape = dict(queries=35, keys=35, heads=1, persistent=1)
    assert_equal_to_the_definition(policy(**shape, window=20), policy(**shape, seed=1), query_mask=query_mask)


def test_a_policy_is_at_no_distance_from_itself_and_is_not_pulled():
    one = policy(persistent=1)
    stats = compare(one, one)
    assert (stats.divergence == 0).all()
    assert torch.equal(stats.entropy, stats.entropy_ref)
    assert all((x == 0).all() for x in torch.autograd.grad(stats.divergence.sum(), one[:2]))


@pytest.mark.parametrize("nudge", [1e-3, 1e-5])
def test_small_distances_keep_their_digits(nudge):
    one = policy(queries=9)
    other = one._replace(
        k=one.k.detach() + nudge * torch.randn(one.k.shape, generator=torch.Generator().manual_seed(2))
    )
    twin, expected = define(one, other)
    stats = compare(one, other)
    assert (stats.divergence >= 0).all()
    torch.testing.assert_close(stats.divergence.double(), expected.divergence, rtol=5e-2, atol=1e-14)
    expected_grads = torch.autograd.grad(expected.divergence.sum(), twin[:2])
    for a, b in zip(expected_grads, torch.autograd.grad(stats.divergence.sum(), one[:2]), strict=True):
        torch.testing.assert_close(b.double(), a, rtol=5e-2, atol=5e-2 * a.abs().max().item())


def test_a_vanishing_mass_still_has_a_distribution():
    """A query has weight e^-200 on all earlier tokens, which underflows in float32."""
    k = torch.tensor([0.0, math.log(3), 200.0]).view(1, 1, 3, 1)
    one = AttentionPolicy(torch.ones(1, 1, 1, 1), k, 1.0, None, 0)
    stats = compare(one, one)
    assert stats.mass.item() == 0
    assert stats.entropy.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75), abs=1e-4)


@pytest.mark.parametrize("divergence", ["jsd", "kl"])
def test_huge_scores_stay_finite(divergence):
    one, other = policy(persistent=1), policy(seed=1)
    one, other = (x._replace(q=(x.q.detach() * 500).requires_grad_(), k=x.k.detach() * 500) for x in (one, other))
    stats = compare(one, other, divergence=divergence)
    assert all(x.isfinite().all() for x in stats)
    assert torch.autograd.grad((stats.divergence + stats.entropy + stats.mass).sum() * 1e-3, one.q)[0].isfinite().all()


@pytest.mark.parametrize("part", ["divergence", "entropy", "mass"])
def test_one_output_alone_can_have_a_gradient(part):
    one, other = policy(), policy(seed=1)
    twin, expected = define(one, other)
    a = torch.autograd.grad(getattr(expected, part).sum(), twin.q)[0]
    b = torch.autograd.grad(getattr(compare(one, other), part).sum(), one.q)[0]
    torch.testing.assert_close(b.double(), a, rtol=0, atol=5e-6)


def test_the_reference_is_a_constant():
    one, other = policy(), policy(seed=1)
    stats = triton_autograd.attention_divergence_triton(one, other, None, None, True, "jsd")
    assert not stats.entropy_ref.requires_grad
    stats.divergence.sum().backward()
    assert one.q.grad is not None
    assert other.q.grad is None


def test_saved_tensors_grow_with_queries_and_heads_only():
    saved = []
    one, other = policy(), policy(seed=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        compare(one, other)
    inputs = sum(x.numel() for x in (*one[:2], *other[:2]))
    assert sum(saved) == inputs + 6 * (2 + 2 + 4)


@pytest.mark.parametrize("queries", [1, 100, 4096])
@pytest.mark.parametrize("window", [None, 1, 512])
@pytest.mark.parametrize("past", [0, 70])
def test_slabs_hold_every_tile_that_is_seen_and_no_map(queries, window, past):
    tiles, heads, keys = Tiles(64, 32, 32, 4, 1), 4, queries + past
    side = triton_autograd._Side.of(torch.empty(1, heads, queries, 1), torch.empty(1, 1, keys, 1), 1.0, window, 0)
    slots, slabs = triton_autograd._slabs(side, tiles)
    held = slots * tiles.rows * tiles.columns * max(slab.blocks for slab in slabs)
    assert held <= max(triton_autograd.SLAB * heads * queries, slots * tiles.rows * tiles.columns)
    blocks = [range(slab.first_block, slab.first_block + slab.blocks) for slab in slabs]
    assert list(itertools.chain(*blocks)) == list(range(-(-queries // tiles.rows)))
    for slab in slabs:
        for block in range(slab.first_block, slab.first_block + slab.blocks):
            first_time = block * tiles.rows + past
            last_time = min(first_time + tiles.rows, keys) - 1
            first_key = 0 if window is None else max(0, first_time - window + 1)
            first, last = first_key // tiles.columns, last_time // tiles.columns
            assert last - first < slots
            assert slab.first_tile <= first
            assert last < slab.first_tile + slab.tiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=torch.float64), "takes float32, bfloat16 and float16 queries and keys, got torch.float64"),
        (dict(dim=257), "heads of at most 256 dimensions, got 257"),
    ],
)
@pytest.mark.parametrize("reference", [False, True])
def test_unsupported_inputs_are_named(change, message, reference):
    policies = [policy(), policy(**change)]
    with pytest.raises(ValueError, match=message):
        compare(*(policies if reference else reversed(policies)))


@pytest.mark.parametrize("masked", [True, False])
def test_builds_have_the_arguments_of_their_kernels(masked):
    builds = triton_autograd.builds(64, 80, torch.bfloat16, masked=masked)
    assert len({build.name for build in builds}) == 6
    for build in builds:
        assert list(build.signature) == build.kernel.arg_names
        constants = {name for name, kind in build.signature.items() if kind == "constexpr"}
        assert constants == set(build.constexprs)
        assert {name for name in build.kernel.arg_names if name.isupper()} <= constants
