"""Distillation: zero loss for a student equal to its teacher, and convergence of a different one."""

import math
from itertools import product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hybridmem.data.tokenizer import byte_tokenizer
from hybridmem.rl import AttentionDistillation
from hybridmem.rl.attention.distributions import attention, distribution
from hybridmem.rl.attention.divergence import divergence_of
from hybridmem.rl.objectives.distillation import attention_jsd, generalized_jsd, observed
from hybridmem.rl.rollouts.completions import Completions
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.scoring import completion_logps
from tests.hybridmem.models import tiny_model

LENGTH = 5


def llama(seed=0, **changes):
    """Return a small Llama in float64 with large weights."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).double().eval()


STUDENTS = {
    "llama": llama,
    "mag": lambda: tiny_model(variant="mag", attention_window=32),  # the teacher's reach
    "swa": lambda: tiny_model(variant="swa"),
}


def other_teacher():
    return llama(1, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, head_dim=4)


def responses():
    """Return two prompts of different lengths, and responses of which the second ends early."""
    generator = torch.Generator().manual_seed(2)
    prompts = pad_prompts(
        [torch.randint(0, 37, (n,), generator=generator).tolist() for n in (12, 8)], 0, torch.device("cpu")
    )
    ids = torch.randint(0, 37, (2, LENGTH), generator=generator)
    mask = torch.tensor([[True] * LENGTH, [True] * 3 + [False] * 2])
    return prompts, Completions(ids, mask, ~mask[:, -1], torch.zeros(2, LENGTH))


def observe(model, layer=-1):
    prompts, completions = responses()
    with observed(model, layer) as seen:
        completion_logps(model, prompts, completions, 1.0)
    return seen[0]


def distil(student, teacher, **settings):
    """Return the loss and metrics of a student and a teacher."""
    objective = AttentionDistillation(teacher="x", **settings)
    with torch.no_grad():
        taught = observe(teacher, objective.teacher_layer)
    return objective.compute_loss(observe(student, objective.student_layer), taught, responses()[1].mask)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
        (1.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        # the mixture is (3/8, 5/8)
        (0.5, (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)) / 2),
        # the mixture is (7/16, 9/16)
        (
            0.25,
            0.25 * (0.25 * math.log(4 / 7) + 0.75 * math.log(4 / 3))
            + 0.75 * (0.5 * math.log(8 / 7) + 0.5 * math.log(8 / 9)),
        ),
    ],
)
def test_the_divergence_of_one_half_from_one_quarter(beta, expected):
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert generalized_jsd(student, teacher, beta).item() == pytest.approx(expected, abs=1e-6)


def test_the_temperature_divides_the_logits_of_both():
    student, teacher = torch.tensor([1.0, 9.0]).log(), torch.tensor([9.0, 1.0]).log()  # at 2: 1/4 and 3/4
    assert generalized_jsd(student, teacher, 0.0, 2.0).item() == pytest.approx(0.5 * math.log(3), abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("model", STUDENTS)
def test_a_student_like_its_teacher_is_left_alone(model, beta):
    student = STUDENTS[model]()
    loss, metrics = distil(student, student, beta=beta)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert all(abs(value.item()) < 1e-12 for value in metrics.values())
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-10


@pytest.mark.parametrize("model", STUDENTS)
def test_heads_and_depth_may_differ(model):
    student, teacher = STUDENTS[model](), other_teacher()
    loss, metrics = distil(student, teacher, mu=2.0, gamma=3.0, student_layer=0, teacher_layer=1)
    mask = responses()[1].mask
    ours, theirs = observe(student, 0), observe(teacher, 1)
    assert ours.logits.shape == theirs.logits.shape == (2, LENGTH, 37)
    maps = [attention(view.record, LENGTH) for view in (ours, theirs)]
    torch.testing.assert_close(metrics["attention_divergence"], divergence_of(*maps, "jsd")[mask].mean())
    torch.testing.assert_close(metrics["gkd"], generalized_jsd(ours.logits, theirs.logits)[mask].mean())
    torch.testing.assert_close(loss.detach(), 2 * metrics["gkd"] + 3 * metrics["attention_divergence"])
    assert min(metrics.values()) > 0.01


TEACHERS = {"llama": other_teacher, "swa": lambda: tiny_model(variant="swa", attention_window=4)}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(
    ("model", "target"), [*product(STUDENTS, ["attention"]), ("mag", "unified"), ("swa", "unified")]
)
def test_prompts_that_are_read_once_teach_the_same(model, target, teacher):
    """Groups share the prefill of their prompt, although a window's cache keeps fewer keys than full attention's."""
    student, other = STUDENTS[model](), TEACHERS[teacher]()
    prompts, completions = responses()
    pairs = [torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])]
    prompts, completions = prompts.select(pairs[0]), Completions(*(x[pairs[1]] for x in completions))
    objective = AttentionDistillation(teacher="x", target=target)
    found = []
    for times in (1, 2, torch.tensor([1, 1, 2])):
        with observed(student, -1, times) as seen:
            completion_logps(student, prompts, completions, 1.0, times)
        with torch.no_grad(), observed(other, -1, times) as taught:
            completion_logps(other, prompts, completions, 1.0, times)
        loss, metrics = objective.compute_loss(seen[0], taught[0], completions.mask)
        parameters = [p for p in student.parameters() if p.requires_grad]
        found.append([loss, *metrics.values(), *torch.autograd.grad(loss, parameters, allow_unused=True)])
    assert found[0][2] > 0.01
    alone, *shared = ([x for x in each if x is not None] for each in found)
    for each in shared:
        torch.testing.assert_close(each, alone)


def test_observed_logits_are_those_of_the_generated_tokens():
    model, (prompts, completions) = llama(), responses()
    with observed(model, -1) as seen:
        logps, _ = completion_logps(model, prompts, completions, 1.0)
    chosen = seen[0].logits.log_softmax(-1).gather(2, completions.ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, logps)
    assert not model._forward_hooks


def test_tokens_after_a_response_are_ignored():
    student, teacher, mask = observe(llama()), observe(other_teacher()), responses()[1].mask
    objective = AttentionDistillation(teacher="x")
    expected, _ = objective.compute_loss(student, teacher, mask)
    teacher.logits = teacher.logits.masked_fill(~mask.unsqueeze(-1), torch.nan)
    assert torch.equal(objective.compute_loss(student, teacher, mask)[0], expected)
    assert objective.compute_loss(student, teacher, torch.zeros_like(mask))[0] == 0


@pytest.mark.parametrize(
    ("model", "target"),
    [("mag", "unified"), ("mag", "memory"), ("lmm", "memory"), ("swa", "unified")],
)
def test_a_memory_is_compared_with_the_teachers_attention(model, target):
    student, teacher = tiny_model(variant=model), other_teacher()
    _, metrics = distil(student, teacher, target=target)
    mask = responses()[1].mask
    ours = distribution(observe(student).record, target, LENGTH)
    theirs = attention(observe(teacher).record, LENGTH)
    torch.testing.assert_close(metrics["attention_divergence"], divergence_of(ours, theirs, "jsd")[mask].mean())


@pytest.mark.parametrize(
    ("model", "metric", "target"),
    [
        ("llama", "gkd", "attention"),
        ("llama", "attention_divergence", "attention"),
        ("mag", "attention_divergence", "attention"),
        ("mag", "attention_divergence", "unified"),
        ("mag", "attention_divergence", "memory"),
    ],
)
def test_the_student_comes_nearer(model, metric, target):
    student, teacher = STUDENTS[model](), other_teacher()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    measured = []
    for _ in range(15):
        loss, metrics = distil(student, teacher, mu=float(metric == "gkd"), gamma=float(metric != "gkd"), target=target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        measured.append(metrics[metric].item())
    assert measured[-1] < 0.5 * measured[0]
    assert all(p.grad is None for p in teacher.parameters())


def test_a_half_precision_teacher():
    student, teacher = llama().float(), other_teacher().bfloat16()
    with torch.no_grad():
        taught = observe(teacher)
    loss, _ = AttentionDistillation(teacher="x").compute_loss(observe(student), taught, responses()[1].mask)
    exact, _ = distil(llama(), other_teacher())
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_attention_jsd_is_bounded():
    jsd = attention_jsd(observe(llama()).record, observe(other_teacher()).record, responses()[1].mask)
    assert jsd.shape == (2, LENGTH)
    assert jsd.min() >= 0
    assert jsd.max() <= math.log(2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mu=-1.0), "mu=-1.0 must be 0 or a positive number"),
        (dict(gamma=math.inf), "gamma=inf must be 0 or a positive number"),
        (dict(mu=0.0, gamma=0.0), "turn distillation off"),
        (dict(beta=1.5), "beta=1.5 must be between 0"),
        (dict(temperature=0.0), "temperature=0.0 must be a positive number"),
        (dict(target="allocation"), "target must be one of attention, memory, unified, not 'allocation'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionDistillation(teacher="x", **settings)


@pytest.mark.parametrize(
    ("settings", "teacher", "message"),
    [
        ({}, lambda: llama(vocab_size=38), "vocab_size=38, but the student has 37"),
        (dict(student_layer=2), other_teacher, "student_layer=2 is out of range for a model of 2 layers"),
        (dict(teacher_layer=-4), other_teacher, "teacher_layer=-4 is out of range for a model of 3 layers"),
        ({}, lambda: tiny_model(variant="lmm"), "teacher_layer=-1 has variant lmm, which has no attention"),
        (dict(target="memory"), other_teacher, "target='memory' needs a memory, which student_layer=-1 lacks"),
        ({}, lambda: tiny_model(variant="mac"), "teacher_layer=-1 has variant mac, which attends within its segm"),
    ],
)
def test_models_that_cannot_be_compared(settings, teacher, message):
    objective = AttentionDistillation(teacher="x", **settings)
    with pytest.raises(ValueError, match=message):
        objective.check_models(llama(), teacher())


def test_ids_must_mean_the_same_to_both():
    objective, other = AttentionDistillation(teacher="x"), byte_tokenizer()
    objective.check_tokenizers(byte_tokenizer(), other)
    other.add_tokens(["word"])
    with pytest.raises(ValueError, match=r"teacher='x' differs from the data's in 1 ids, the first being 259"):
        objective.check_tokenizers(byte_tokenizer(), other)
