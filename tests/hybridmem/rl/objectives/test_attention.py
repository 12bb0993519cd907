"""AttentionRL: advantage times divergence, no gradient at the rollout's policy, and errors for invalid settings."""

import math

import pytest
import torch

from hybridmem.rl import AttentionRecorder, AttentionRL
from hybridmem.rl.attention.distributions import distribution
from hybridmem.rl.attention.divergence import divergence_of
from hybridmem.rl.attention.exploration import draw_noise, explored
from hybridmem.rl.attention.targets import TARGETS
from tests.hybridmem.models import tiny_model, tokens

ADVANTAGES = torch.tensor([1.5, -0.5], dtype=torch.float64)
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def two_policies(variant="mag", layers=(-1,)):
    """Return the records of a model and of its earlier weights."""
    records = []
    for seed in (0, 1):
        model = tiny_model(variant=variant, seed=0)
        if seed == 0:
            torch.manual_seed(5)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
        with AttentionRecorder(model, layers) as recorder:
            model(tokens(time=16), use_cache=False)
        records.append((model, recorder.records))
    (model, now), (_, before) = records
    return model, now, {n: record.detach() for n, record in before.items()}


def naive(p, q, kind):
    """Compute the loss by its definition, row by row."""
    total = []
    for row, old in zip(p.flatten(0, 1), q.flatten(0, 1), strict=True):
        middle = (row + old) / 2

        def kl(a, b):
            return sum((x * (x / y).log() for x, y in zip(a, b, strict=True) if x > 0), torch.zeros(()).double())

        values = {"jsd": (kl(row, middle) + kl(old, middle)) / 2, "kl": kl(old, row), "reverse_kl": kl(row, old)}
        total.append(values[kind])
    return torch.stack(total).view(p.shape[:2])


@pytest.mark.parametrize("positions", ["generated", "predicting"])
@pytest.mark.parametrize("divergence", ["jsd", "kl", "reverse_kl"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_is_advantage_times_divergence(target, divergence, positions):
    model, now, before = two_policies()
    objective = AttentionRL(target=target, divergence=divergence, positions=positions, weight=0.7)
    loss, metrics = objective.compute_loss(now, before, ADVANTAGES, MASK)
    shift = int(positions == "predicting")
    p, q = (distribution(records[1], target, 6 + shift)[:, :6] for records in (now, before))
    expected = 0.7 * (ADVANTAGES[:, None] * naive(p, q, divergence) * MASK).sum() / MASK.sum()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    naive_grads = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 1e-6 for grad in grads)
    for grad, other in zip(grads, naive_grads, strict=True):
        if grad is not None and other is not None:
            torch.testing.assert_close(grad, other, rtol=0, atol=1e-9)
    assert metrics["effective_span"] >= 1


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_pulls_where_nothing_moved(target):
    model, now, _ = two_policies()
    loss, metrics = AttentionRL(target=target).compute_loss(
        now, {n: r.detach() for n, r in now.items()}, ADVANTAGES, MASK
    )
    assert abs(loss) < 1e-12
    assert metrics["divergence"] < 1e-12
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(grad is None or grad.abs().max() < 1e-9 for grad in grads)


@pytest.mark.parametrize("target", ["attention", "allocation", "memory"])
def test_exploration_pulls_from_the_first_step_on(target):
    """Attention moves towards the noisy pattern of a rewarded response."""
    model, ids = tiny_model(variant="mag"), tokens(time=16)
    noise = draw_noise(model, target, [1], 1.0, 1, 2, 16, torch.Generator().manual_seed(0))
    noise = {n: eps.double() for n, eps in noise.items()}
    with torch.no_grad(), explored(model, target, noise), AttentionRecorder(model) as recorder:
        model(ids[:1].repeat(2, 1), use_cache=False)
        before = {n: record.detach() for n, record in recorder.records.items()}
    objective = AttentionRL(target=target, exploration=1.0)

    def loss_now():
        with AttentionRecorder(model) as recorder:
            model(ids[:1].repeat(2, 1), use_cache=False)
        return objective.compute_loss(recorder.records, before, torch.tensor([1.0, 0.0]).double(), MASK, noise)[0]

    first = loss_now()
    first.backward()
    moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
    slope = sum(parameter.grad.square().sum() for parameter in moved)
    with torch.no_grad():
        for parameter in moved:
            parameter -= 0.1 * first / slope * parameter.grad  # a tenth of the way for a linear loss
    assert loss_now() < 0.95 * first


def test_padding_and_prompt_tokens_are_ignored():
    _, now, before = two_policies()
    objective = AttentionRL()
    loss, _ = objective.compute_loss(now, before, ADVANTAGES, MASK)
    nothing, _ = objective.compute_loss(now, before, ADVANTAGES, torch.zeros_like(MASK))
    assert nothing == 0
    first, _ = objective.compute_loss(now, before, torch.tensor([1.5, 0.0]).double(), MASK)
    second, _ = objective.compute_loss(now, before, torch.tensor([0.0, -0.5]).double(), MASK)
    torch.testing.assert_close(first + second, loss)


def test_the_bonus_and_the_least_span_widen():
    _, now, before = two_policies()
    still = torch.zeros(2).double()
    plain, metrics = AttentionRL().compute_loss(now, before, still, MASK)
    bonus, _ = AttentionRL(entropy_bonus=0.3).compute_loss(now, before, still, MASK)
    torch.testing.assert_close(bonus, plain - 0.3 * metrics["entropy"])
    floor, _ = AttentionRL(min_span=50).compute_loss(now, before, still, MASK)
    torch.testing.assert_close(floor, plain + math.log(50) - metrics["entropy"])
    low, _ = AttentionRL(min_span=1).compute_loss(now, before, still, MASK)
    assert low == plain


def test_several_layers_are_averaged():
    _, now, before = two_policies(layers=(0, 1))
    both, _ = AttentionRL(layers=(0, 1)).compute_loss(now, before, ADVANTAGES, MASK)
    alone = [AttentionRL().compute_loss({n: now[n]}, {n: before[n]}, ADVANTAGES, MASK)[0] for n in (0, 1)]
    torch.testing.assert_close(both, sum(alone) / 2)


def test_disjoint_rows_are_ln_2_apart():
    p, q = torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0]]])
    torch.testing.assert_close(divergence_of(p, q, "jsd"), torch.tensor([[math.log(2)]]))
    assert divergence_of(p, q, "kl").isfinite().all()
    assert (divergence_of(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), "jsd") == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target="attentions"), "target='attentions' is unknown; choose one of attention"),
        (dict(divergence="js"), "divergence='js' is unknown"),
        (dict(positions="all"), "positions='all' is unknown"),
        (dict(weight=-1.0), "weight=-1.0 must be 0 or a positive number"),
        (dict(min_span=0.5), "min_span=0.5 must be at least 1"),
        (dict(target="unified", exploration=1.0), "set exploration=0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionRL(**settings)
