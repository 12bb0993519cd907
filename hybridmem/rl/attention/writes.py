"""Units that write: the memories of a model's layers, which store a token or skip it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor, nn

from hybridmem.model.heads import HeadMixer
from hybridmem.model.memory import NeuralMemory
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.model.sequence import TokenSequence

from .allocations import Share, ShareOfTokens
from .recorder import decoder_layers

WHOLE = "mag, mal, lmm or mah"


class MemoryUnits:
    """Memories of layers, which store the tokens whose share is above a half and skip the others.

    A memory of `mah` stores a token when it leaves the window, the others when they read it. Its state is the one
    after a text without the skipped tokens.

    Args:
        layers: numbers of the layers with a memory.
        delay: tokens between a token and its write.
        skipped: first tokens of a text, which no memory stores.
    """

    num_heads = 1

    def __init__(self, layers: list[int], delay: int, skipped: int):
        self.layers, self.delay, self.skipped = layers, delay, skipped
        self.window_and_sinks = (delay, skipped)

    def sources_of(self, opened: Bool[Tensor, "layers heads"]) -> None:
        """Return None: memories are not KV heads."""

    def applied(self, model: Any, share: Share | None) -> AbstractContextManager[None]:
        """Return a context in which layers store all tokens or none; None stores all."""
        if share is None:
            return nullcontext()
        return self.routed(model, lambda place, x: share[:, place].expand(len(x), x.shape[1]))

    @contextmanager
    def routed(self, model: Any, share_of: ShareOfTokens) -> Iterator[None]:
        """Run with memories that store the tokens whose share is above a half."""
        layers = decoder_layers(model)
        with ExitStack() as stack:
            for place, number in enumerate(self.layers):
                hook = layers[number].mixer.register_forward_pre_hook(_choosing(place, share_of))
                stack.callback(hook.remove)
            yield

    def counted(self, read: Bool[Tensor, "rows time"]) -> Bool[Tensor, "rows time"]:
        """Mark the tokens whose writes the reading of these tokens depends on."""
        place: Int[Tensor, "rows time"] = read.cumsum(1) - 1
        last = read.sum(1, keepdim=True) - 1
        return read & (place >= self.skipped) & (place + self.delay <= last)


def _choosing(place: int, share_of: ShareOfTokens) -> Any:
    """Return a hook that passes a mixer the tokens that its memory stores."""

    def pass_on(_: nn.Module, arguments: tuple[Tensor, Any, TokenSequence]) -> tuple[Tensor, Any, TokenSequence]:
        x, state, sequence = arguments
        return x, state, replace(sequence, writes=share_of(place, x) > 0.5)

    return pass_on


def find_memories(model: Any) -> MemoryUnits:
    """Return the memories of a model that can skip tokens.

    Raises:
        ValueError: a model without memories, or with memories that store every token.
    """
    if not isinstance(model, HybridMemForCausalLM):
        raise ValueError(f"unit=write, but {type(model).__name__} has no memory: use a model with layers of {WHOLE}")
    config = model.config
    kinds = ", ".join(sorted(set(config.layer_types or ())))
    if config.memory_depth > 1:
        raise ValueError(f"unit=write, but memory_depth={config.memory_depth} stores every token: use memory_depth=1")
    if "mac" in (config.layer_types or ()):
        raise ValueError(f"unit=write, but layers of mac store whole segments: use a model with layers of {WHOLE}")
    mixers = dict(enumerate(layer.mixer for layer in decoder_layers(model)))
    sources = config.head_sources or []
    heads = [n for n, mixer in mixers.items() if isinstance(mixer, HeadMixer) and "memory" in sources[n]]
    if heads:
        return MemoryUnits(heads, config.attention_window, config.num_sink_tokens)
    found = [n for n, mixer in mixers.items() if isinstance(getattr(mixer, "memory", None), NeuralMemory)]
    if not found:
        raise ValueError(
            f"unit=write, but no head of this model's layers ({kinds}) reads a memory: use a model with layers of "
            f"{WHOLE}, and for mah fit memories first (configs/retrofit)"
        )
    return MemoryUnits(found, 0, 0)
