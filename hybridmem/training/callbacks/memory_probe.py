"""Probe of a model's memory and attention on a text."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor, nn

from hybridmem.distributed import unsharded
from hybridmem.metrics.entropy import entropy
from hybridmem.metrics.retention import retention_half_life
from hybridmem.model.attention import ShortRangeAttention
from hybridmem.model.memory import NeuralMemory
from hybridmem.model.mixers import GateMixer
from hybridmem.model.modeling import HybridMemForCausalLM


@torch.no_grad()
def observe(
    model: HybridMemForCausalLM,
    input_ids: Int[Tensor, "batch time"],
    document_ids: Int[Tensor, "batch time"] | None = None,
) -> dict[str, float]:
    """Read a text, and return metrics averaged over layers, heads and tokens.

    * memory/surprise: error norm of a token before its write, ‖M(W; k) - v‖
    * memory/alpha, memory/eta, memory/theta: gates
    * memory/half_life: number of tokens after which half of a write is forgotten, as the median over heads
    * memory/state_norm: Frobenius norm of a head's weights after the text
    * allocation/attention: share of attention in mag's gated mix
    * attention/effective_span: exp(entropy) of the head-averaged attention, in tokens
    """
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def watch_memory(memory: NeuralMemory, arguments: tuple[Any, ...], _: Any) -> None:
        trace = memory.trace(*arguments)
        for name, values in trace._asdict().items():
            seen[f"memory/{name}"].append(values.float())

    def watch_gate(_: nn.Module, __: tuple[Any, ...], logits: Tensor) -> None:
        seen["allocation/attention"].append(torch.sigmoid(logits.float()))

    def watch_attention(_: nn.Module, __: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
        if outputs[2] is not None:
            seen["attention/effective_span"].append(entropy(outputs[2].float().mean(1)).exp())

    hooks = []
    for module in model.modules():
        if isinstance(module, NeuralMemory):
            hooks.append(module.register_forward_hook(watch_memory))
        elif isinstance(module, GateMixer):
            hooks.append(module.allocation_gate.register_forward_hook(watch_gate))
        elif isinstance(module, ShortRangeAttention):
            hooks.append(module.register_forward_hook(watch_attention))
    try:
        with _eager(model):
            model.model(input_ids, document_ids=document_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: torch.stack([v.mean() for v in values]).mean().item() for name, values in seen.items()}
    if "memory/alpha" in seen:
        half_lives = torch.cat([retention_half_life(alpha) for alpha in seen["memory/alpha"]])
        means["memory/half_life"] = half_lives.median().item()
    return means


@contextmanager
def _eager(model: HybridMemForCausalLM) -> Iterator[None]:
    """Use eager attention, which returns its weights, and eval mode within a context."""
    implementation, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)


class MemoryMonitor(L.Callback):
    """Callback that logs surprise, gates, state norm, half-life, allocation and effective span on one row.

    Args:
        every_n_steps: optimiser steps between two probes.
        tokens: number of tokens to read from the row; a probe needs memory for tokens² attention weights per head.
    """

    def __init__(self, every_n_steps: int = 50, tokens: int = 512):
        if every_n_steps < 1 or tokens < 2:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1 and tokens={tokens} at least 2")
        self.every_n_steps, self.tokens = every_n_steps, tokens
        self.last_step = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last probe."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last probe."""
        self.last_step = state_dict["last_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Raise a ValueError for a model of transformers, which has no memory to probe."""
        if not any(isinstance(module, HybridMemForCausalLM) for module in pl_module.modules()):
            raise ValueError(
                "MemoryMonitor probes HybridMem models, but model.init_args.config is a transformers model's; remove "
                "MemoryMonitor from trainer.callbacks"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: dict[str, torch.Tensor], batch_idx: int
    ) -> None:
        """Probe the model every `every_n_steps` optimiser steps."""
        step = trainer.global_step
        if step == self.last_step or step % self.every_n_steps:
            return
        self.last_step = step
        row = {name: batch[name][:1, : self.tokens] for name in ("input_ids", "document_ids") if name in batch}
        with unsharded(pl_module.model):
            pl_module.log_dict(observe(pl_module.model, **row))
