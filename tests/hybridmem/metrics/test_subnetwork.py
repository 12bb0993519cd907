"""Sparsity, rank and overlap of known updates and of random masks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hybridmem.metrics import StoredWeights, subnetwork_overlap, update_masks, update_rank, update_sparsity
from hybridmem.metrics import subnetwork as module
from hybridmem.metrics.subnetwork import kind_of, layer_of
from hybridmem.metrics.weights import write_masks

NAMES = ("model.layers.0.mlp.weight", "model.layers.0.norm.weight", "model.layers.1.mlp.weight", "lm_head.weight")


def weights(*shapes):
    torch.manual_seed(0)
    return {name: torch.rand(shape) / 2 + 0.5 for name, shape in zip(NAMES, shapes, strict=True)}


def test_sparsity_by_tensor_layer_kind_and_in_total():
    before = weights((4, 5), (5,), (4, 5), (3, 5))
    after = {name: tensor.clone() for name, tensor in before.items()}
    after[NAMES[0]][0] += 0.25  # 5 of 20
    after[NAMES[2]][:, 0] -= 0.25  # 4 of 20
    after[NAMES[3]] += 0.25  # all 15
    found = update_sparsity(before, after)
    assert found.by_tensor == {NAMES[0]: 15 / 20, NAMES[1]: 1, NAMES[2]: 16 / 20, NAMES[3]: 0}
    assert found.by_layer == {"model.layers.0": 20 / 25, "model.layers.1": 16 / 20, "lm_head": 0}
    assert found.by_kind == {"mlp.weight": 31 / 40, "norm.weight": 1, "lm_head.weight": 0}
    assert found.total == 36 / 60


@pytest.mark.parametrize(
    ("tolerance", "dtype", "expected"),
    [
        # 1 + 1e-3 is 1 in bfloat16, whose step there is 2⁻⁷; 0.01 + 1e-4 is not 0.01, whose step is 2⁻¹⁴.
        (1e-5, torch.bfloat16, [True, False, False, True]),
        (1e-5, torch.float32, [False, False, False, True]),
        (1e-6, torch.bfloat16, [True, False, False, False]),
        (2e-4, torch.bfloat16, [True, True, False, True]),
        (1e-2, torch.float32, [True, True, False, True]),
    ],
)
def test_the_tolerance_and_the_precision_decide(tolerance, dtype, expected):
    before = {"w": torch.tensor([1.0, 0.01, 1.0, 0.0])}
    after = {"w": torch.tensor([1.001, 0.0101, 1.25, 5e-6])}
    ((name, mask),) = update_masks(before, after, tolerance, dtype)
    assert name == "w"
    assert mask.tolist() == [not within for within in expected]
    assert update_sparsity(before, after, tolerance, dtype).total == sum(expected) / 4


@settings(max_examples=40, deadline=None)
@example(np.full((3, 7), 1e-5, dtype=np.float32), 1e-7)
@given(arrays.arrays("float32", (3, 7), elements=st.floats(-1, 1, width=32)), st.sampled_from(module.SWEEP))
def test_it_is_the_papers_definition(update, tolerance):
    """The definition is isclose on bfloat16 with an absolute tolerance only, also when applied in pieces."""
    before = torch.linspace(-1, 1, 21).view(3, 7)
    after = before + torch.tensor(update) / 100
    cast_after, cast_before = (
        after.bfloat16().float(),
        before.bfloat16().float(),
    )  # otherwise isclose would round the tolerance too
    expected = torch.isclose(cast_after, cast_before, rtol=0, atol=tolerance)
    whole = update_sparsity({"w": before}, {"w": after}, tolerance).total
    assert whole == pytest.approx(expected.float().mean().item())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "PIECE", 4)
        assert update_sparsity({"w": before}, {"w": after}, tolerance).total == whole
        assert torch.equal(dict(update_masks({"w": before}, {"w": after}, tolerance))["w"], ~expected)


def test_tensors_without_entries_have_no_share():
    empty = {"a": torch.ones(0, 3), "b": torch.ones(2)}
    found = update_sparsity(empty, empty)
    assert math.isnan(found.by_tensor["a"])
    assert found.total == 1
    none = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in empty.items()}
    all_of_b = none | {"b": torch.ones(2, dtype=torch.bool)}
    assert subnetwork_overlap(all_of_b, all_of_b).total.chance_by_tensor == [1, 1]


def test_nan_is_an_update():
    before, after = {"w": torch.zeros(2)}, {"w": torch.tensor([0.0, math.nan])}
    assert update_sparsity(before, after).total == 0.5
    assert next(iter(update_masks(before, after)))[1].tolist() == [False, True]


def test_rank_of_a_low_rank_update():
    torch.manual_seed(0)
    before = {
        "wide": torch.zeros(12, 30),
        "tall": torch.zeros(30, 12),
        "still": torch.ones(4, 4),
        "norm": torch.ones(5),
    }
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["wide"] += torch.randint(-3, 4, (12, 3)).float() @ torch.randint(-3, 4, (3, 30)).float()
    after["tall"] += torch.rand(30, 12)
    assert update_rank(before, after) == {"wide": 3 / 12, "tall": 1, "still": 0}


masks_of = arrays.arrays(bool, (2, 3, 4))


@settings(max_examples=60, deadline=None)
@given(masks_of, masks_of, st.sampled_from([2, 3]))
def test_overlap_equals_that_of_index_sets(one, two, count):
    three = two ^ one[::-1]
    drawn = [one, two, three][:count]
    masks = [{f"h.{n}.w": torch.tensor(mask[n]) for n in range(2)} for mask in drawn]
    places = [{tuple(place) for place in torch.tensor(mask).nonzero().tolist()} for mask in drawn]
    found = subnetwork_overlap(*masks)
    shared = set.intersection(*places)
    for number, own in enumerate(places):
        others = [other for n, other in enumerate(places) if n != number]
        if not own:
            assert math.isnan(found.total.shares[number])
            continue
        assert found.total.shares[number] == pytest.approx(len(shared) / len(own))
        assert found.total.chance[number] == pytest.approx(math.prod(len(other) / 24 for other in others))
        # Within a tensor, the chance that an entry is also in another mask is that mask's density.
        expected = sum(math.prod(sum(p[0] == n for p in other) / 12 for other in others) for n, *_ in own) / len(own)
        assert found.total.chance_by_tensor[number] == pytest.approx(expected)
        in_first = [place for place in own if place[0] == 0]
        if in_first:
            expected = sum(place in shared for place in in_first) / len(in_first)
            assert found.by_tensor["h.0.w"].shares[number] == pytest.approx(expected)
            assert found.by_layer["h.0"] == found.by_tensor["h.0.w"]


def test_chance_equals_the_overlap_of_random_masks():
    torch.manual_seed(0)
    dense, thin = torch.rand(400, 400) < 0.4, torch.rand(400, 400) < 0.1
    found = subnetwork_overlap({"w": dense}, {"w": thin}).total
    assert found.shares == pytest.approx(found.chance, abs=0.01)
    assert found.chance == pytest.approx([0.1, 0.4], abs=0.01)


def test_agreement_on_tensors_and_on_entries_are_distinguished():
    torch.manual_seed(0)
    masks = [{"a": torch.rand(300, 300) < 0.5, "b": torch.zeros(300, 300, dtype=torch.bool)} for _ in range(2)]
    found = subnetwork_overlap(*masks).total
    assert found.shares == pytest.approx([0.5, 0.5], abs=0.01)
    assert found.chance == pytest.approx([0.25, 0.25], abs=0.01)
    assert found.chance_by_tensor == pytest.approx(found.shares, abs=0.01)


def test_stored_weights_give_the_same(tmp_path):
    from safetensors.torch import save_file

    before = weights((4, 5), (5,), (4, 5), (3, 5))
    after = {name: tensor + 0.25 * (torch.rand_like(tensor) > 0.5) for name, tensor in before.items()}
    for name, state in (("a", before), ("b", after)):
        save_file(state | {"places": torch.arange(3)}, tmp_path / f"{name}.safetensors")
    stored = [StoredWeights(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert update_sparsity(*stored).by_tensor == update_sparsity(before, after).by_tensor
    assert update_rank(*stored) == update_rank(before, after)
    shapes = {name: stored[0].shapes[name] for name in NAMES}
    masks = dict(update_masks(*stored))
    write_masks(tmp_path / "mask.safetensors", shapes, ((name, masks[name]) for name in NAMES))
    read = StoredWeights(tmp_path / "mask.safetensors")
    assert subnetwork_overlap(read, masks).total.shares == [1, 1]


def test_names_of_layers_and_kinds():
    assert layer_of("transformer.h.11.attn.c_proj.weight") == "transformer.h.11"
    assert kind_of("transformer.h.11.attn.c_proj.weight") == "attn.c_proj.weight"
    assert kind_of("model.layers.3.experts.2.up.weight") == "experts.2.up.weight"
    assert layer_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert kind_of("model.embed_tokens.weight") == "model.embed_tokens.weight"
    assert layer_of("0.weight") == "0"


def test_refusals():
    one = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(ValueError, match="only weights number 1 has b; only weights number 2 has c, d, e … "):
        update_sparsity(one, {name: torch.ones(2) for name in "acdef"})
    with pytest.raises(ValueError, match=r"a is \[2\] in weights number 1 and \[3\] in weights number 2"):
        update_masks(one, {"a": torch.ones(3), "b": torch.ones(3)})
    with pytest.raises(ValueError, match="the weights hold no floating-point tensor"):
        update_rank({"a": torch.ones(1, 1).long()}, {"a": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"tolerance=-1\.0 must be at least 0"):
        update_sparsity(one, one, tolerance=-1.0)
    with pytest.raises(ValueError, match=r"masks are bool, not torch\.float32"):
        subnetwork_overlap(one, one)
    with pytest.raises(ValueError, match="needs at least two subnetworks, not 1"):
        subnetwork_overlap(one)
