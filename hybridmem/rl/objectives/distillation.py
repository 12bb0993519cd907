"""On-policy attention distillation: answer alone, then look where a teacher looks (RAL, arXiv 2602.04884).

Student and teacher read the student's own responses. With p_t the attention of a layer at token t, a mean over heads,
and P_t the distribution that token t was drawn from, the objectives' losses get a further term

    μ · mean_t JSD_β(P_teacher,t ‖ P_student,t)  +  γ · mean_t JSD(p_student,t ‖ p_teacher,t)

where t runs over generated tokens. A student may look through its memory where the teacher attends: p_student is then
what `target` names of it, such as `unified`. The first term is generalised knowledge distillation, GKD (arXiv
2306.13649), whose settings have TRL's names; its `lmbda` is 1 here, as every response is the student's. Heads, their
size and the number of layers may differ between the two models.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hybridmem.checks import one_of
from hybridmem.model.configuration import MEMORY_VARIANTS
from hybridmem.model.modeling import HybridMemLayer
from hybridmem.rl.attention.distributions import attention, distribution, over_the_same
from hybridmem.rl.attention.divergence import divergence_of
from hybridmem.rl.attention.recorder import AttentionRecorder, LayerRecord, decoder_layers
from hybridmem.rl.rollouts.experience import Experience, Scores
from hybridmem.rl.rollouts.policy import Policy
from hybridmem.rl.rollouts.prompts import Times
from hybridmem.rl.rollouts.scoring import completion_logps
from hybridmem_kernels.memory_scan import state_dtype

from .objective import LossAndMetrics, ModelLoader, Objective

OVER_TOKENS = ("attention", "memory", "unified")
# What their layers attend to is not one distribution over the row's earlier tokens.
NOT_COMPARABLE = {"mac": "attends within its segment", "lmm": "has no attention"}


@dataclass
class Observation:
    """What a model made of generated tokens: the logits that they were drawn from, and what one layer did."""

    logits: Float[Tensor, "responses length vocab"]
    record: LayerRecord


@contextmanager
def observed(model: nn.Module, layer: int, times: int | Times = 1) -> Iterator[list[Observation]]:
    """A context in which `completion_logps` leaves an observation, that of its last pass; the model stays as it was.

    Args:
        model: a causal LM of transformers, inside PEFT or not.
        layer: which one, from the end if negative.
        times: see `completion_logps`.

    Raises:
        ValueError: see AttentionRecorder.
    """
    seen: list[Observation] = []
    with AttentionRecorder(model, [layer], times) as recorder:

        def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            (record,) = recorder.records.values()
            seen[:] = [Observation(output.logits[:, :-1], record)]  # the last logits predict no token

        hook = model.register_forward_hook(note)
        try:
            yield seen
        finally:
            hook.remove()


@dataclass(frozen=True, kw_only=True)
class AttentionDistillation(Objective):
    """mu · GKD + gamma · mean over generated t of JSD(p_student,t ‖ p_teacher,t): RAL's distillation.

    Args:
        teacher: a Hugging Face folder or name, or a checkpoint (.ckpt), with the student's tokenizer.
        mu: weight of the divergence between the distributions of the next token.
        gamma: weight of the divergence between the attentions. The paper tries 0.05, 0.5 and 1; this is the middle.
        beta: which divergence between next tokens: 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher), between
            them the generalised JSD.
        temperature: that both models' logits are divided by before they are compared.
        target: which of the student's distributions is to be like the teacher's attention: `attention`, `memory` or
            `unified`, attention and memory as the gate mixes them.
        student_layer, teacher_layer: whose attention is compared, from the end if negative.

    Raises:
        ValueError: a setting that cannot work.
    """

    family: ClassVar[str] = "AttentionDistillation"
    prefix: ClassVar[str] = "distillation/"

    teacher: str
    mu: float = 1.0
    gamma: float = 0.5
    beta: float = 0.5
    temperature: float = 1.0
    target: str = "attention"
    student_layer: int = -1
    teacher_layer: int = -1

    def __post_init__(self) -> None:
        for name in ("mu", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or a positive number")
        if not self.mu and not self.gamma:
            raise ValueError("mu=0 and gamma=0: nothing would be learnt from the teacher; raise one")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must be between 0, for KL(teacher ‖ student), and 1, for its reverse")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be a positive number")
        one_of(OVER_TOKENS, target=self.target)

    @property
    def trains_head(self) -> bool:
        """The divergence between next tokens does."""
        return bool(self.mu)

    def prepare(self, policy: Policy, load: ModelLoader) -> None:
        """Load the teacher and compare it with the policy.

        Raises:
            ValueError: a teacher that cannot be loaded, or whose vocabulary, layers or tokenizer do not fit.
        """
        try:
            teacher, tokenizer = load(self.teacher)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"teacher={self.teacher!r} cannot be loaded: set a Hugging Face folder or name, or a "
                f"checkpoint of hybridmem fit ({str(error).splitlines()[0]})"
            ) from error
        self.check_models(policy.model, teacher)
        if tokenizer is not None:
            self.check_tokenizers(policy.tokenizer, tokenizer)
        policy.frozen["teacher"] = teacher.eval().requires_grad_(False)

    def observe(self, model: Any, times: int | Times) -> AbstractContextManager[list[Observation]]:
        """Keep the student's logits and attention of a pass."""
        return observed(model, self.student_layer, times)

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return `compute_loss` of the responses; the teacher reads them in each step, as its logits are large."""
        teacher = policy.frozen_model("teacher")
        with torch.no_grad(), observed(teacher, self.teacher_layer, batch.times) as seen:
            completion_logps(teacher, batch.prompts, batch.completions, temperature, batch.times)
        return self.compute_loss(scores.seen[self.family][0], seen[0], batch.mask)

    def compute_loss(
        self, student: Observation, teacher: Observation, mask: Bool[Tensor, "responses length"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss of some responses, and its metrics.

        Args:
            student: what the policy made of them, with gradients.
            teacher: what the teacher made of the same tokens, without.
            mask: the generated tokens that count; the last `length` tokens of the rows.

        Returns:
            The loss, and without gradient the means over tokens, in nats, of `gkd` and `attention_divergence`.
        """
        count = mask.sum().clamp(min=1)
        jsd = generalized_jsd(student.logits[mask], teacher.logits[mask], self.beta, self.temperature)
        gkd = jsd.sum() / count
        divergence = self._divergence(student.record, teacher.record, mask).sum() / count
        metrics = {"gkd": gkd.detach(), "attention_divergence": divergence.detach()}
        return self.mu * gkd + self.gamma * divergence, metrics

    def _divergence(
        self, student: LayerRecord, teacher: LayerRecord, mask: Bool[Tensor, "responses length"]
    ) -> Float[Tensor, "responses length"]:
        """JSD(p_student,t ‖ p_teacher,t) in nats at the last `length` tokens of the rows; 0 off the mask."""
        if self.target == "attention":
            return attention_jsd(student, teacher, mask)
        length = mask.shape[1]
        ours, theirs = over_the_same(distribution(student, self.target, length), attention(teacher, length))
        return mask * divergence_of(ours, theirs, "jsd")

    def check_models(self, student: Any, teacher: Any) -> None:
        """Raise a ValueError when the vocabularies differ in size or a layer's attention cannot be compared."""
        sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher={self.teacher!r} has a vocab_size of {sizes[1]} and the student of {sizes[0]}: their next "
                "tokens cannot be compared; choose a teacher with the student's vocabulary"
            )
        for name, model in (("student_layer", student), ("teacher_layer", teacher)):
            number, layers = getattr(self, name), decoder_layers(model)
            if not -len(layers) <= number < len(layers):
                raise ValueError(f"{name}={number} is not there: the model has {len(layers)} layers")
            layer = layers[number]
            variant = layer.variant if isinstance(layer, HybridMemLayer) else None
            if variant in NOT_COMPARABLE and (name == "teacher_layer" or self.target == "attention"):
                reason = NOT_COMPARABLE[variant]
                raise ValueError(f"{name}={number} is of variant {variant}, which {reason}: choose another layer")
            if name == "student_layer" and self.target == "memory" and variant not in MEMORY_VARIANTS:
                raise ValueError(f"target='memory': {name}={number} has no memory; choose another layer or target")

    def check_tokenizers(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        """Raise a ValueError when an id stands for different tokens.

        How text is cut into tokens may differ: the teacher reads the student's ids, never text.
        """
        ours, theirs = ({id: token for token, id in x.get_vocab().items()} for x in (student, teacher))
        different = sorted(id for id in ours.keys() | theirs.keys() if ours.get(id) != theirs.get(id))
        if different:
            first = different[0]
            raise ValueError(
                f"teacher={self.teacher!r} has another tokenizer than the data: {len(different)} ids differ, the first "
                f"is {first}, {theirs.get(first)!r} to the teacher and {ours.get(first)!r} to the data; choose a "
                "teacher with the student's tokenizer"
            )


def generalized_jsd(
    student_logits: Float[Tensor, "*tokens vocab"],
    teacher_logits: Float[Tensor, "*tokens vocab"],
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """β KL(P_teacher ‖ M) + (1 − β) KL(P_student ‖ M) with M = β P_teacher + (1 − β) P_student, in nats (GKD, eq. 1).

    At its ends, where that is 0, it is KL(P_teacher ‖ P_student) for β = 0 and KL(P_student ‖ P_teacher) for β = 1.
    """
    student, teacher = (
        (logits.to(state_dtype(logits.dtype)) / temperature).log_softmax(-1)
        for logits in (student_logits, teacher_logits)
    )
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(log_p: Float[Tensor, "*tokens vocab"], log_q: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens"]:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def attention_jsd(
    student: LayerRecord, teacher: LayerRecord, mask: Bool[Tensor, "responses length"]
) -> Float[Tensor, "responses length"]:
    """JSD(p_student,t ‖ p_teacher,t) in nats at the last `length` tokens of the rows; 0 off the mask."""
    assert student.attention is not None  # see check_models
    assert teacher.attention is not None
    ours, theirs = (side.last_queries(mask.shape[1]) for side in (student.attention, teacher.attention))
    return ours.compare(theirs, mask).jsd
