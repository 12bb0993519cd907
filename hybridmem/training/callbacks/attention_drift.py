"""Divergence of a policy's attention from the initial model's attention, with its span and allocation."""

from collections.abc import Sequence

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from hybridmem.checks import at_least
from hybridmem.metrics.distance import BeyondWindow, MeanDistance
from hybridmem.metrics.entropy import entropy
from hybridmem.rl.attention.distributions import allocation, distribution
from hybridmem.rl.attention.divergence import divergence_of
from hybridmem.rl.attention.recorder import AttentionRecorder, LayerRecord
from hybridmem.rl.attention.targets import KINDS
from hybridmem.rl.rollouts.sampling import evaluating, read
from hybridmem.training.checkpoints.contents import load_policy
from hybridmem.training.policy.module import PolicyModule

QUERIES = 1  # the prompt's last token, which predicts the first token of the response


class AttentionDrift(L.Callback):
    """Callback that compares attention with the initial model's at every validation.

    The attention is read at the last token of held-out prompts. The metrics under `val/attention/layer_N/` are:

    * `divergence_from_start`: Jensen–Shannon divergence from the initial model, in nats
    * `entropy`, in nats, and `effective_span` and `mean_distance`, in tokens
    * `beyond_window`: attention mass on tokens beyond `window`
    * `allocation/persistent`, `allocation/memory` and `allocation/window`: shares of layers with a memory

    Args:
        layers: layers to compare; negative numbers count from the end.
        target: distribution to compare: `attention`, `allocation`, `memory` or `unified`.
        num_prompts: number of held-out prompts.
        window: window length in tokens for `beyond_window`. None: do not log `beyond_window`.

    Raises:
        ValueError: the module is not a PolicyModule, or a layer cannot be recorded or lacks the distribution.
    """

    def __init__(
        self, layers: Sequence[int] = (-1,), target: str = "attention", num_prompts: int = 32, window: int | None = None
    ):
        at_least(1, num_prompts=num_prompts)
        if target == "allocation" and window is not None:
            raise ValueError(f"window={window} needs a target over tokens, not allocation; set window to null")
        self.layers, self.target, self.num_prompts = layers, target, num_prompts
        self.how_far: dict[str, MeanDistance | BeyondWindow] = {}
        if target != "allocation":
            self.how_far["mean_distance"] = MeanDistance()
        if window is not None:
            self.how_far["beyond_window"] = BeyondWindow(window)
        self._start: dict[int, Float[Tensor, "prompts _ choices"]] | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the attention, and log its metrics."""
        if not isinstance(pl_module, PolicyModule):
            raise ValueError(f"AttentionDrift supports PolicyModule, not {type(pl_module).__name__}; remove it")
        if self._start is None:  # load the initial model again, so that a resumed run compares with the same start
            initial = load_policy(pl_module.model_name).to(pl_module.device)
            initial.set_attn_implementation(pl_module.attn_implementation)
            self._start = {n: self._distribution(record) for n, record in self._look(pl_module, initial).items()}
        for number, record in self._look(pl_module, pl_module.model).items():
            p = self._distribution(record)
            nats = entropy(p)
            measured = {
                "divergence_from_start": divergence_of(p, self._start[number], "jsd").mean(),
                "entropy": nats.mean(),
                "effective_span": nats.exp().mean(),
            }
            for name, metric in self.how_far.items():
                metric.to(p.device).reset()
                metric.update(p, p.sum(-1) > 0)
                measured[name] = metric.compute().float()
            if record.memory is not None:
                shares = allocation(record, QUERIES).mean((0, 1))
                measured |= {f"allocation/{kind}": share for kind, share in zip(KINDS, shares, strict=True)}
            pl_module.log_dict({f"val/attention/layer_{number}/{name}": value for name, value in measured.items()})

    def _distribution(self, record: LayerRecord) -> Float[Tensor, "prompts _ choices"]:
        return distribution(record, self.target, QUERIES)

    @torch.no_grad()
    def _look(self, module: PolicyModule, model: torch.nn.Module) -> dict[int, LayerRecord]:
        examples = [module.data.task.example("val", number) for number in range(self.num_prompts)]
        prompts = module.worker.policy.prompt_batch([module.data.prompt(example) for example in examples])
        with evaluating(model), AttentionRecorder(model, self.layers) as recorder:
            read(model, prompts, None)
        return recorder.records
