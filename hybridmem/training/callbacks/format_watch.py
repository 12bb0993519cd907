"""Which formats a policy answers in, and what several of its answers are good for."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from hybridmem.metrics.formats import FormatShare
from hybridmem.metrics.pass_at_k import MajAtK, PassAtK
from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.policy.validation import Answered


class FormatWatch(L.Callback):
    """Logs, at every validation, of the responses that are sampled for held-out prompts as in training:

    * `val/format/share/NAME` and `val/format/accuracy/NAME` of each format, `val/format/entropy` of the shares in nats
    * `val/pass@K`, the chance that one of K is right, and `val/maj@K`, that the commonest answer of K is

    `val/pass@1` is PolicyModule's own. Validation samples `num_generations` responses to each prompt. More, or at
    another temperature: hybridmem validate with other settings of the model (docs/watch.md).

    An answer's vote is what the task's `final_answer(text)` makes of it, None being no vote; for tasks without such a
    function it is the text, without white space at its end.

    Args:
        formats: a regular expression for each format's name (see FormatShare); None: the task's `formats`.
        k: sizes of the groups; None: `num_generations`.

    Raises:
        ValueError: formats that are none; before the first batch, a module that is no PolicyModule, a task without
            answers or formats, or k out of 2 to num_generations.
    """

    def __init__(self, formats: dict[str, str] | None = None, k: Sequence[int] | None = None):
        if k is not None and not k:
            raise ValueError("k names no size of a group: give one or more, or null")
        self.formats, self.k = formats, k
        self._share: FormatShare | None = None if formats is None else FormatShare(formats)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look whether module and task have what is asked for."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"FormatWatch looks at PolicyModule, not {type(pl_module).__name__}: remove it")
        task = trainer.datamodule.task
        if self._share is None:
            if not hasattr(task, "formats"):
                raise ValueError(f"FormatWatch: the task {type(task).__name__} tells no formats apart: give formats")
            self._share = FormatShare(task.formats)
        if "answer" not in task.example("val", 0):
            raise ValueError(f"FormatWatch: the task {type(task).__name__} has no column answer to tell what is right")
        groups = [pl_module.num_generations] if self.k is None else self.k
        if max(groups) > pl_module.num_generations or min(groups) < 2:
            raise ValueError(
                f"FormatWatch's k={list(groups)} must be from 2 to num_generations={pl_module.num_generations}, the "
                "responses of each prompt: set k, or raise num_generations"
            )
        self._passed = {k: PassAtK(k) for k in groups}
        self._won = {k: MajAtK(k) for k in groups}
        self._final_answer = getattr(task, "final_answer", str.rstrip)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last validation."""
        for metric in self._metrics():
            metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        """Count what was answered."""
        answered: Answered = outputs
        assert self._share is not None
        self._share.update(answered.sampled, answered.sampled_right)
        right = torch.tensor(answered.by_example(answered.sampled_right), device=pl_module.device)
        votes = answered.by_example([self._final_answer(text) for text in answered.sampled])
        answers = [self._final_answer(example["answer"]) for example in answered.examples]
        for passed, won in zip(self._passed.values(), self._won.values(), strict=True):
            passed.update(right)
            won.update(votes, answers)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log; the metrics add up over processes by themselves."""
        assert self._share is not None
        values = {f"val/format/{name}": value for name, value in self._share.compute().items()}
        values |= {f"val/pass@{k}": metric.compute() for k, metric in self._passed.items()}
        values |= {f"val/maj@{k}": metric.compute() for k, metric in self._won.items()}
        pl_module.log_dict({name: value.float() for name, value in values.items()})

    def _metrics(self) -> list[Any]:
        return [self._share, *self._passed.values(), *self._won.values()]
