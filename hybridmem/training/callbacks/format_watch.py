"""Answer formats of a policy, with pass@k and maj@k."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from hybridmem.metrics.formats import FormatShare
from hybridmem.metrics.pass_at_k import MajAtK, PassAtK
from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.policy.validation import Answered


class FormatWatch(L.Callback):
    """Callback that logs answer formats, pass@k and maj@k at every validation.

    Validation samples `num_generations` responses to each held-out prompt, as in training. Over these responses, the
    callback logs:

    * `val/format/share/NAME` and `val/format/accuracy/NAME` of each format, and the shares' `val/format/entropy` in
      nats
    * `val/pass@K`, the probability that one of K responses is right, and `val/maj@K`, the probability that their
      majority answer is right

    PolicyModule itself logs `val/pass@1`. For more responses or another temperature, run hybridmem validate with other
    model settings (docs/watch.md).

    A response votes for the task's `final_answer(text)`, or abstains if that is None. If the task has no
    `final_answer`, the response votes for its text without trailing white space.

    Args:
        formats: regular expression of each format by name (see FormatShare). None: the task's `formats`.
        k: group sizes. None: `num_generations`.

    Raises:
        ValueError: a format is invalid, or, before the first batch, the module is not a PolicyModule, the task lacks
            answers or formats, or k is not between 2 and num_generations.
    """

    def __init__(self, formats: dict[str, str] | None = None, k: Sequence[int] | None = None):
        if k is not None and not k:
            raise ValueError("k=[] has no group size; give one or more, or set it to null")
        self.formats, self.k = formats, k
        self._share: FormatShare | None = None if formats is None else FormatShare(formats)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check module and task, and create the metrics."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"FormatWatch supports PolicyModule, not {type(pl_module).__name__}; remove it")
        task = trainer.datamodule.task
        if self._share is None:
            if not hasattr(task, "formats"):
                raise ValueError(f"FormatWatch needs formats, and the task {type(task).__name__} has none; set formats")
            self._share = FormatShare(task.formats)
        if "answer" not in task.example("val", 0):
            raise ValueError(
                f"FormatWatch needs the column answer, which the task {type(task).__name__} lacks; remove FormatWatch"
            )
        groups = [pl_module.num_generations] if self.k is None else self.k
        if max(groups) > pl_module.num_generations or min(groups) < 2:
            raise ValueError(
                f"FormatWatch's k={list(groups)} must be between 2 and num_generations={pl_module.num_generations}, "
                "the responses per prompt; change k, or raise num_generations"
            )
        self._passed = {k: PassAtK(k) for k in groups}
        self._won = {k: MajAtK(k) for k in groups}
        self._final_answer = getattr(task, "final_answer", str.rstrip)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the metrics."""
        for metric in self._metrics():
            metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        """Update the metrics with a batch of answers."""
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
        """Log the metrics, which sum over ranks by themselves."""
        assert self._share is not None
        values = {f"val/format/{name}": value for name, value in self._share.compute().items()}
        values |= {f"val/pass@{k}": metric.compute() for k, metric in self._passed.items()}
        values |= {f"val/maj@{k}": metric.compute() for k, metric in self._won.items()}
        pl_module.log_dict({name: value.float() for name, value in values.items()})

    def _metrics(self) -> list[Any]:
        return [self._share, *self._passed.values(), *self._won.values()]
