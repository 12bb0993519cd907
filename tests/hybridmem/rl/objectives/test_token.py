"""Losses, advantages and gradients of token objectives, compared with values computed by hand.

Two responses, of three and two tokens, have advantages 1 and −1 and these importance ratios r:

    A = +1:  1.0  1.5  0.5
    A = −1:  1.5  0.5
"""

import math

import pytest
import torch
from jsonargparse import ArgumentParser

from hybridmem.rl import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    DrGRPO,
    RejectionFineTune,
    SWEDapo,
    TokenObjective,
    group_advantages,
    groups_with_signal,
)

RATIO = torch.tensor([[1.0, 1.5, 0.5], [1.5, 0.5, 1.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
ADVANTAGES = torch.tensor([1.0, -1.0], dtype=torch.float64)
OLD = torch.full_like(RATIO, math.log(0.25))


def loss_of(objective, ratio=RATIO, advantages=ADVANTAGES, mask=MASK, ref=None, **denominators):
    """Return the loss, the metrics as numbers, and the gradient with respect to the policy's log-probabilities."""
    old = OLD[: len(ratio)]
    logps = (old + ratio.log()).requires_grad_()
    ref_logps = None if ref is None else old + ref.log()
    loss, metrics = objective.compute_loss(logps, old, advantages, mask, ref_logps, **denominators)
    loss.backward()
    return loss.item(), {name: value.item() for name, value in metrics.items()}, logps.grad


# With ε = 0.2, the first response's token losses are −1, −min(1.5, 1.2) and −min(0.5, 0.8), with sum −2.7;
# the second's are −min(−1.5, −1.2) and −min(−0.5, −0.8), with sum 2.3.
@pytest.mark.parametrize(
    ("loss_type", "denominators", "expected"),
    [
        ("grpo", {}, (-2.7 / 3 + 2.3 / 2) / 2),
        ("bnpo", {}, (-2.7 + 2.3) / 5),
        ("dapo", {"num_items": 10}, (-2.7 + 2.3) / 10),
        ("dapo", {"num_items": torch.tensor(10)}, (-2.7 + 2.3) / 10),
        ("dr_grpo", {"max_completion_length": 4}, (-2.7 + 2.3) / (2 * 4)),
    ],
)
def test_clipped_loss_and_its_denominator(loss_type, denominators, expected):
    loss, metrics, _ = loss_of(GRPO(loss_type=loss_type, beta=0.0), **denominators)
    assert loss == pytest.approx(expected)
    # 1.5 is clipped at A > 0 and 0.5 at A < 0: one of five tokens each.
    assert metrics == pytest.approx(
        {"clip_ratio/low_mean": 0.2, "clip_ratio/high_mean": 0.2, "clip_ratio/region_mean": 0.4}
    )


def test_clipped_tokens_have_no_gradient():
    """All other tokens have gradient −r A over the number of tokens, because d r / d log π = r."""
    _, _, gradient = loss_of(GRPO(loss_type="bnpo", beta=0.0))
    assert (gradient * 5).tolist() == [pytest.approx([-1.0, 0.0, -0.5]), pytest.approx([1.5, 0.0, 0.0])]


def test_clip_higher():
    loss, _, _ = loss_of(DAPO(), num_items=5)
    assert loss == pytest.approx((-1 - 1.28 - 0.5 + 1.5 + 0.8) / 5)
    _, metrics, gradient = loss_of(DAPO(epsilon_high=0.6), num_items=5)
    assert metrics["clip_ratio/high_mean"] == 0
    assert gradient[0, 1].item() == pytest.approx(-1.5 / 5)


def test_delta_bounds_unclipped_ratios():
    """Clipping ignores large ratios at A < 0; delta bounds their loss and stops their gradient."""
    loss, _, gradient = loss_of(GRPO(loss_type="bnpo", beta=0.0, delta=1.3))
    assert loss == pytest.approx((-2.7 + 1.3 + 0.8) / 5)
    assert gradient[1].tolist() == [0, 0, 0]


def test_a_sequence_has_one_ratio():
    """(1 · 1.5 · 0.5)^⅓ = 0.909 is not clipped at A > 0; (1.5 · 0.5)^½ = 0.866 is clipped to 0.95 at A < 0."""
    loss, metrics, gradient = loss_of(GSPO(epsilon=0.05, epsilon_high=0.05))
    first = 0.75 ** (1 / 3)
    assert loss == pytest.approx((-first + 0.95) / 2)
    assert metrics == {"clip_ratio/low_mean": 0.5, "clip_ratio/high_mean": 0.0, "clip_ratio/region_mean": 0.5}
    assert gradient[0].tolist() == pytest.approx([-first / 3 / 2] * 3)
    assert gradient[1].tolist() == [0, 0, 0]


def test_cispo_bounds_the_weight_and_keeps_every_gradient():
    """The gradients are −min(r, 1.25) A, also at r = 1.5, where GRPO has none."""
    loss, metrics, gradient = loss_of(CISPO(epsilon_high=1.25), num_items=10)
    assert (gradient * 10).tolist() == [pytest.approx([-1.0, -1.25, -0.5]), pytest.approx([1.25, 0.5, 0.0])]
    logps = [math.log(0.25 * r) for r in (1.0, 1.5, 0.5, 1.5, 0.5)]
    weights = [-1.0, -1.25, -0.5, 1.25, 0.5]
    assert loss == pytest.approx(sum(w * logp for w, logp in zip(weights, logps, strict=True)) / 10)
    assert metrics == {"cispo_clip_ratio": 0.2}  # as in TRL, only for positive advantages


@pytest.mark.parametrize("corrected", [False, True])
def test_kl_and_its_gradient(corrected):
    """With q = π_ref/π, k3 = q − ln q − 1 has gradient 1 − q; multiplied by r, it has the KL's gradient −r ln q."""
    objective = GRPO(loss_type="bnpo", beta=0.5, use_bias_correction_kl=corrected)
    ref = torch.tensor([[2.0, 1.5, 1.0], [0.5, 1.0, 7.0]], dtype=torch.float64)
    loss, metrics, gradient = loss_of(objective, advantages=torch.zeros_like(ADVANTAGES), ref=ref)
    q = ref / RATIO
    kl, slope = q - q.log() - 1, 1 - q
    if corrected:
        kl, slope = RATIO * kl, -RATIO * q.log()
    mean_kl = kl[MASK].mean().item()
    assert metrics["kl"] == pytest.approx(mean_kl)
    assert loss == pytest.approx(0.5 * mean_kl)
    torch.testing.assert_close(gradient, 0.5 * slope * MASK / 5)


def test_kl_is_measured_without_weight():
    ref = RATIO * 2
    loss, metrics, _ = loss_of(DrGRPO(), ref=ref, max_completion_length=4)
    assert metrics["kl"] == pytest.approx(2 - math.log(2) - 1)
    assert loss == loss_of(DrGRPO(), max_completion_length=4)[0]


@pytest.mark.parametrize("objective", [GRPO(), DrGRPO(), DAPO(), GSPO(), CISPO(beta=0.1), GRPO(loss_type="bnpo")])
def test_masked_values_are_ignored(objective):
    """This holds even for NaN; responses without tokens count as 0, never as 0 / 0."""
    denominators = {"num_items": 5, "max_completion_length": 4}
    ref = RATIO + 0.1
    loss, metrics, gradient = loss_of(objective, ref=ref, **denominators)
    spoilt, spoilt_ref = RATIO.masked_fill(~MASK, torch.nan), ref.masked_fill(~MASK, torch.nan)
    other_loss, other_metrics, other_gradient = loss_of(objective, spoilt, ref=spoilt_ref, **denominators)
    assert (loss, metrics) == (other_loss, other_metrics)
    assert torch.equal(gradient, other_gradient)
    assert gradient[1, 2] == 0

    empty = torch.zeros_like(MASK)
    nothing, of_nothing, no_gradient = loss_of(objective, mask=empty, ref=ref, num_items=0, max_completion_length=4)
    assert nothing == 0
    assert set(of_nothing.values()) == {0}
    assert not no_gradient.any()


def test_a_response_without_tokens_counts_in_the_mean():
    mask = MASK & torch.tensor([[True], [False]])
    assert loss_of(GRPO(beta=0.0), mask=mask)[0] == pytest.approx((-2.7 / 3 + 0) / 2)
    # The response has no ratio that could be clipped.
    assert loss_of(GSPO(epsilon=0.05, epsilon_high=0.05), mask=mask)[1]["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize(
    ("objective", "whole", "each"),
    [
        (DAPO(), {"num_items": 5}, {"num_items": 5 / 2}),  # 5 tokens in 2 calls are 2.5 per call
        (CISPO(), {"num_items": 5}, {"num_items": 5 / 2}),
        (DrGRPO(), {"max_completion_length": 4}, {"max_completion_length": 4}),
        (GSPO(), {}, {}),
    ],
)
def test_calls_that_share_a_batch_average_to_it(objective, whole, each):
    loss, _, gradient = loss_of(objective, **whole)
    parts = [loss_of(objective, RATIO[i : i + 1], ADVANTAGES[i : i + 1], MASK[i : i + 1], **each) for i in (0, 1)]
    assert sum(part[0] for part in parts) / 2 == pytest.approx(loss)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]) / 2, gradient)


def test_truncated_responses_carry_no_loss_where_they_are_masked():
    truncated = torch.tensor([True, False])
    assert torch.equal(GRPO().loss_mask(MASK, truncated), MASK)
    masked = GRPO(mask_truncated_completions=True).loss_mask(MASK, truncated)
    assert masked.tolist() == [[False] * 3, [True, True, False]]


# The groups have means 3/4 and 2 and standard deviations (with n − 1) √((3 · (1/4)² + (3/4)²) / 3) = 1/2 and 0. All
# rewards have mean 11/8 and sum of squares 19, so their standard deviation is √((19 − 8 · (11/8)²) / 7) = √(31/8 / 7).
REWARDS = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
CENTRED = torch.tensor([0.25, 0.25, -0.75, 0.25, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(("scale_rewards", "scale"), [("group", 0.5), ("batch", (31 / 8 / 7) ** 0.5), ("none", None)])
def test_group_advantages(scale_rewards, scale):
    expected = CENTRED if scale is None else CENTRED / (scale + 1e-4)
    torch.testing.assert_close(group_advantages(REWARDS, 4, scale_rewards), expected)


def test_groups_with_signal():
    assert groups_with_signal(REWARDS, 4).tolist() == [True, False]
    assert groups_with_signal(REWARDS, 2).tolist() == [False, True, False, False]


@pytest.mark.parametrize("function", [group_advantages, groups_with_signal])
def test_groups_must_be_whole_and_of_more_than_one(function):
    with pytest.raises(ValueError, match="num_generations=1 gives every response an advantage of 0"):
        function(REWARDS, 1)
    with pytest.raises(ValueError, match="8 rewards cannot be split into groups of num_generations=3"):
        function(REWARDS, 3)


def test_unknown_scale():
    with pytest.raises(ValueError, match="scale_rewards='std' is unknown; choose one of group, batch, none"):
        group_advantages(REWARDS, 4, "std")


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        (GRPO, {"epsilon": 0.0}, "epsilon=0.0 must be above 0"),
        (GRPO, {"epsilon": math.nan}, "epsilon=nan must be above 0"),
        (DAPO, {"epsilon_high": -0.1}, "epsilon_high=-0.1 must be above 0"),
        (GRPO, {"delta": 1.2}, r"delta=1.2 must be above 1 \+ epsilon_high = 1.2"),
        (GRPO, {"beta": -0.1}, "must be 0 .no reference model. or a positive number"),
        (GRPO, {"beta": math.inf}, "beta=inf"),
        (CISPO, {"epsilon_high": 0.28}, "epsilon_high=0.28 must be above 1"),
        (GRPO, {"loss_type": "cispo"}, "loss_type='cispo' is unknown; choose one of grpo, bnpo, dapo, dr_grpo"),
        (GRPO, {"scale_rewards": "std"}, "scale_rewards='std' is unknown"),
        (GSPO, {"importance_sampling_level": "turn"}, "importance_sampling_level='turn' is unknown"),
    ],
)
def test_settings_that_cannot_work(algorithm, settings, message):
    with pytest.raises(ValueError, match=message):
        algorithm(**settings)


@pytest.mark.parametrize(
    ("objective", "missing"), [(GRPO(), "ref_logps"), (DAPO(), "num_items"), (DrGRPO(), "max_completion_length")]
)
def test_missing_arguments_of_an_algorithm_raise(objective, missing):
    with pytest.raises(ValueError, match=f"pass {missing}"):
        loss_of(objective)


@pytest.mark.parametrize("algorithm", [GRPO, DrGRPO, DAPO, GSPO, CISPO])
def test_chosen_by_class_path(algorithm):
    """Every objective has its own defaults, regardless of another's beta."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--objective", type=TokenObjective)
    parsed = parser.parse_args([f"--objective=hybridmem.rl.{algorithm.__name__}", "--objective.beta=1"])
    assert parser.instantiate(parsed).objective == algorithm(beta=1.0)


def test_long_trajectories_pay():
    objective = SWEDapo(free_turns=10)
    rewards, turns = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([4, 10, 25, 40])
    assert objective.shape_rewards(rewards, turns, max_turns=40).tolist() == [1.0, 1.0, -0.5, 0.0]
    assert objective.shape_rewards(rewards, turns, max_turns=10).tolist() == rewards.tolist()


def test_groups_that_always_or_never_succeed_are_left_out():
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    assert SWEDapo().kept(rewards, 2).tolist() == [False, False, True, True, False, False]
    assert not SWEDapo(max_solve_rate=0.5).kept(rewards, 2).any()


def test_unsolved_trajectories_are_rejected():
    objective = RejectionFineTune()
    assert objective.kept(torch.tensor([0.0, 1.0, 0.9])).tolist() == [False, True, False]
    logps, mask = torch.tensor([[-1.0, -2.0], [-4.0, -8.0]]), torch.tensor([[True, False], [True, True]])
    assert objective.compute_loss(logps, mask).item() == pytest.approx(13 / 3)
    assert objective.compute_loss(logps, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(dynamic_sampling=True), "not supported by SWEDapo"),
        (dict(free_turns=-1), "free_turns=-1"),
        (dict(min_solve_rate=0.5, max_solve_rate=0.5), "must be below max_solve_rate"),
    ],
)
def test_impossible_settings_of_swe_dapo(settings, message):
    with pytest.raises(ValueError, match=message):
        SWEDapo(**settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nats", [100.0, -100.0, 1e4])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize(
    "objective", [GRPO(), DrGRPO(beta=0.1), DAPO(), GSPO(beta=0.1), CISPO(), GRPO(delta=2.0)], ids=repr
)
def test_ratios_far_apart_stay_finite(objective, advantage, nats, dtype):
    logps = torch.tensor([[-1.0, -1.0, -2.0]], dtype=dtype, requires_grad=True)
    old, mask = torch.tensor([[-1.0 - nats, -1.0, torch.nan]], dtype=dtype), torch.tensor([[True, True, False]])
    reference = torch.tensor([[-1.0 + nats, -1.0, -torch.inf]], dtype=dtype)
    loss, metrics = objective.compute_loss(
        logps,
        old,
        torch.tensor([advantage], dtype=dtype),
        mask,
        ref_logps=reference,
        num_items=2,
        max_completion_length=3,
    )
    loss.backward()
    assert loss.isfinite()
    assert logps.grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())
