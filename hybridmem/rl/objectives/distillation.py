"""On-policy attention distillation: match a teacher's attention on the student's responses (RAL, arXiv 2602.04884).

Student and teacher both score the student's responses. Let p_t be a layer's attention at token t, averaged over heads,
and P_t the distribution from which token t was drawn. The loss is

    μ · mean_t JSD_β(P_teacher,t ‖ P_student,t)  +  γ · mean_t JSD(p_student,t ‖ p_teacher,t)

with t over generated tokens. A student may reach through its memory the tokens that the teacher attends to: `target`
then selects another distribution as p_student, such as `unified`. The first term is generalised knowledge distillation,
GKD (arXiv 2306.13649), with TRL's names for its settings; `lmbda` is fixed at 1, because all responses are the
student's. The two models may differ in the number of layers and in the number and size of heads.
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
# Variants whose layers have no single distribution over the row's earlier tokens.
NOT_COMPARABLE = {"mac": "attends within its segment", "lmm": "has no attention"}


@dataclass
class Observation:
    """A model's logits at the generated tokens, and the record of one layer."""

    logits: Float[Tensor, "responses length vocab"]
    record: LayerRecord


@contextmanager
def observed(model: nn.Module, layer: int, times: int | Times = 1) -> Iterator[list[Observation]]:
    """Observe passes of `completion_logps`; the yielded list holds the observation of the last pass.

    Args:
        model: a causal LM of transformers, with or without PEFT; hooks are removed on exit.
        layer: index of the recorded layer; negative indices count from the end.
        times: see `completion_logps`.

    Raises:
        ValueError: AttentionRecorder cannot record the layer.
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
    """RAL's distillation: mu · GKD + gamma · mean over generated t of JSD(p_student,t ‖ p_teacher,t).

    Args:
        teacher: a Hugging Face folder or name, or a checkpoint (.ckpt); it must share the student's tokenizer.
        mu: weight of the divergence between next-token distributions.
        gamma: weight of the divergence between attention distributions. The paper tries 0.05, 0.5 and 1; the default
            is the middle one.
        beta: the next-token divergence: 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher), and values between
            them give the generalised JSD.
        temperature: divides both models' logits before they are compared.
        target: the student's distribution that is matched to the teacher's attention: `attention`, `memory` or
            `unified`, the gated mixture of attention and memory.
        student_layer, teacher_layer: the layers to compare; negative indices count from the end.

    Raises:
        ValueError: A setting is out of range or unknown.
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
            raise ValueError("mu=0 and gamma=0 turn distillation off; set at least one above 0")
        if not 0 <= self.beta <= 1:
            raise ValueError(
                f"beta={self.beta} must be between 0 (KL(teacher ‖ student)) and 1 (KL(student ‖ teacher))"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be a positive number")
        one_of(OVER_TOKENS, target=self.target)

    @property
    def trains_head(self) -> bool:
        """Return True if mu > 0: only the next-token divergence reaches the LM head."""
        return bool(self.mu)

    def prepare(self, policy: Policy, load: ModelLoader) -> None:
        """Load the teacher, check it against the policy, and store it in `policy.frozen`.

        Raises:
            ValueError: The teacher cannot be loaded, or its vocabulary, layers or tokenizer do not match.
        """
        try:
            teacher, tokenizer = load(self.teacher)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot load teacher={self.teacher!r} ({str(error).splitlines()[0]}); set a Hugging Face folder or "
                "name, or a checkpoint of hybridmem fit"
            ) from error
        self.check_models(policy.model, teacher)
        if tokenizer is not None:
            self.check_tokenizers(policy.tokenizer, tokenizer)
        policy.frozen["teacher"] = teacher.eval().requires_grad_(False)

    def observe(self, model: Any, times: int | Times) -> AbstractContextManager[list[Observation]]:
        """Return a context that records the student's logits and attention."""
        return observed(model, self.student_layer, times)

    def loss(
        self, policy: Policy, batch: Experience, scores: Scores, old: Scores, temperature: float
    ) -> LossAndMetrics:
        """Return the loss of a batch and its metrics; the teacher scores it again, since its logits are large."""
        teacher = policy.frozen_model("teacher")
        with torch.no_grad(), observed(teacher, self.teacher_layer, batch.times) as seen:
            completion_logps(teacher, batch.prompts, batch.completions, temperature, batch.times)
        return self.compute_loss(scores.seen[self.family][0], seen[0], batch.mask)

    def compute_loss(
        self, student: Observation, teacher: Observation, mask: Bool[Tensor, "responses length"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the loss of some responses and its metrics.

        Args:
            student: the policy's observation, with gradients.
            teacher: the teacher's observation of the same tokens, detached.
            mask: the generated tokens that carry loss, among the last `length` tokens of each row.

        Returns:
            The loss, and the detached means over tokens, in nats, of `gkd` and `attention_divergence`.
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
        """Return JSD(p_student,t ‖ p_teacher,t) in nats at the last `length` tokens of each row; 0 off the mask."""
        if self.target == "attention":
            return attention_jsd(student, teacher, mask)
        length = mask.shape[1]
        ours, theirs = over_the_same(distribution(student, self.target, length), attention(teacher, length))
        return mask * divergence_of(ours, theirs, "jsd")

    def check_models(self, student: Any, teacher: Any) -> None:
        """Raise a ValueError if the vocabulary sizes differ or a layer's attention cannot be compared."""
        sizes = [model.config.get_text_config().vocab_size for model in (student, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher={self.teacher!r} has vocab_size={sizes[1]}, but the student has {sizes[0]}; choose a teacher "
                "with the student's vocabulary"
            )
        for name, model in (("student_layer", student), ("teacher_layer", teacher)):
            number, layers = getattr(self, name), decoder_layers(model)
            if not -len(layers) <= number < len(layers):
                raise ValueError(f"{name}={number} is out of range for a model of {len(layers)} layers")
            layer = layers[number]
            variant = layer.variant if isinstance(layer, HybridMemLayer) else None
            if variant in NOT_COMPARABLE and (name == "teacher_layer" or self.target == "attention"):
                reason = NOT_COMPARABLE[variant]
                raise ValueError(f"{name}={number} has variant {variant}, which {reason}; choose another layer")
            if name == "student_layer" and self.target == "memory" and variant not in MEMORY_VARIANTS:
                raise ValueError(
                    f"target='memory' needs a memory, which {name}={number} lacks; choose another layer or target"
                )

    def check_tokenizers(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        """Raise a ValueError if an id maps to different tokens.

        The rules that split text into tokens may differ, because the teacher reads the student's ids and no text.
        """
        ours, theirs = ({id: token for token, id in x.get_vocab().items()} for x in (student, teacher))
        different = sorted(id for id in ours.keys() | theirs.keys() if ours.get(id) != theirs.get(id))
        if different:
            first = different[0]
            raise ValueError(
                f"the tokenizer of teacher={self.teacher!r} differs from the data's in {len(different)} ids, the first "
                f"being {first} ({theirs.get(first)!r} instead of {ours.get(first)!r}); choose a teacher with the "
                "student's tokenizer"
            )


def generalized_jsd(
    student_logits: Float[Tensor, "*tokens vocab"],
    teacher_logits: Float[Tensor, "*tokens vocab"],
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """Return β KL(P_teacher ‖ M) + (1 − β) KL(P_student ‖ M), M = β P_teacher + (1 − β) P_student, in nats (GKD).

    That expression vanishes at both ends, so β = 0 gives KL(P_teacher ‖ P_student) and β = 1 KL(P_student ‖ P_teacher).
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
    """Return JSD(p_student,t ‖ p_teacher,t) in nats at the last `length` tokens of each row; 0 off the mask."""
    assert student.attention is not None  # see check_models
    assert teacher.attention is not None
    ours, theirs = (side.last_queries(mask.shape[1]) for side in (student.attention, teacher.attention))
    return ours.compare(theirs, mask).jsd
