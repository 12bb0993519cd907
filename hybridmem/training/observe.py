"""One look at what a model's memory and attention do with a text."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..attention import ShortRangeAttention
from ..memory import NeuralMemory
from ..metrics import entropy, retention_half_life
from ..modeling import HybridMemForCausalLM
from ..variants import GateMixer


@torch.no_grad()
def observe(
    model: HybridMemForCausalLM,
    input_ids: Int[Tensor, "batch time"],
    document_ids: Int[Tensor, "batch time"] | None = None,
) -> dict[str, float]:
    """Read a text and report, averaged over layers, heads and tokens:

    * memory/surprise: norm of a token's error before it is written, ‖M(W; k) - v‖
    * memory/alpha, memory/eta, memory/theta: the gates
    * memory/half_life: tokens after which forgetting leaves half of a write, the median over heads
    * memory/state_norm: Frobenius norm of a head's weights after the text
    * allocation/attention: mag's gate, the share that attention has in the mix
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
    """Attention with its weights in the open and without dropout, for a while."""
    implementation, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
