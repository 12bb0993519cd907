"""Units that can read beyond a window: KV heads of any causal LM, and the gates of `mag`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hybridmem.model.heads import HeadMixer
from hybridmem.model.mixers import GateMixer
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.model.sequence import HeadChoice, TokenSequence

from .allocations import Share, ShareOfTokens, Units
from .passes import attending_with
from .recorder import decoder_layers

SOURCES = ("none", "memory")
Shares = Callable[[int, Any], Float[Tensor, "rows time heads"]]  # of a layer; time or heads may be 1


class HeadUnits:
    """KV heads of the `mah` layers of a HybridMem model, which read `full` or another source.

    Args:
        model: a HybridMem model.
        source: the other source, `none` or `memory`.

    Raises:
        ValueError: `source` is `memory`, but a layer has none.
    """

    def __init__(self, model: HybridMemForCausalLM, source: str):
        config = model.config
        assert config.layer_types is not None
        self.layers = [number for number, name in enumerate(config.layer_types) if name == "mah"]
        self.num_heads, self.num_layers = config.num_key_value_heads, config.num_hidden_layers
        self.window_and_sinks = (config.attention_window, config.num_sink_tokens)
        for number in self.layers:
            if source == "memory" and decoder_layers(model)[number].mixer.memory is None:
                raise ValueError(
                    f"source=memory, but layer {number} has no memory: convert the model with --head_source memory and "
                    "fit it (configs/retrofit), or set source to none"
                )
        self.sources = [[source] * self.num_heads if number in self.layers else [] for number in range(self.num_layers)]

    def sources_of(self, opened: Bool[Tensor, "layers heads"]) -> list[list[str]]:
        """Return the source of every KV head."""
        rows = dict(zip(self.layers, opened.tolist(), strict=True))
        return [
            ["full" if reads else source for reads, source in zip(rows.get(number, ()), sources, strict=True)]
            for number, sources in enumerate(self.sources)
        ]

    def applied(self, model: Any, share: Share | None) -> AbstractContextManager[None]:
        """Return a context in which heads mix `full` with the other source.

        The model takes the units' window and sinks, which a reference model copied earlier may lack.
        """
        model.config.attention_window, model.config.num_sink_tokens = self.window_and_sinks
        if share is None:
            return model.head_sources(self.sources, full_share=1.0)
        spread = share.new_ones(len(share), self.num_layers, self.num_heads)
        spread[:, self.layers] = share
        return model.head_sources(self.sources, full_share=spread)

    @contextmanager
    def routed(self, model: Any, share_of: ShareOfTokens) -> Iterator[None]:
        """Run with heads that mix `full` with the other source token by token."""
        model.config.attention_window, model.config.num_sink_tokens = self.window_and_sinks
        layers = decoder_layers(model)
        with ExitStack() as stack:
            for place, number in enumerate(self.layers):
                hook = layers[number].mixer.register_forward_pre_hook(self._mixing(place, share_of))
                stack.callback(hook.remove)
            yield

    def _mixing(self, place: int, share_of: ShareOfTokens) -> Any:
        """Return a hook that passes the tokens' shares to a mixer."""

        def pass_on(_: nn.Module, arguments: tuple[Tensor, Any, TokenSequence]) -> tuple[Tensor, Any, TokenSequence]:
            x, state, sequence = arguments
            share = share_of(place, x)[:, None, None].expand(-1, self.num_layers, self.num_heads, -1)
            return x, state, replace(sequence, heads=HeadChoice(self.sources, share))

        return pass_on


class MixedUnits(ABC):
    """Units of a model that reads everything unchanged, mixed with the window by shares of heads or tokens."""

    def applied(self, model: Any, share: Share | None) -> AbstractContextManager[None]:
        """Return a context in which heads mix by their share; None leaves the model unchanged."""
        if share is None:
            return nullcontext()
        return self.mixed(model, lambda place, _: share[:, None, place])

    def routed(self, model: Any, share_of: ShareOfTokens) -> AbstractContextManager[None]:
        """Return a context in which each token mixes, in all heads, by its own share."""
        return self.mixed(model, lambda place, x: share_of(place, x).unsqueeze(-1))

    @abstractmethod
    def mixed(self, model: Any, shares: Shares) -> AbstractContextManager[None]:
        """Return a context in which layers mix by shares computed from their index and input."""


class GateUnits(MixedUnits):
    """Heads of `mag` layers: as trained, or restricted to the window by their gate.

    Args:
        model: a HybridMem model.
    """

    def __init__(self, model: HybridMemForCausalLM):
        layers = decoder_layers(model)
        self.layers = [number for number, layer in enumerate(layers) if isinstance(layer.mixer, GateMixer)]
        self.num_heads = model.config.num_attention_heads
        self.window_and_sinks = (model.config.attention_window, 0)

    def sources_of(self, opened: Bool[Tensor, "layers heads"]) -> None:
        """Return None: gates are not KV heads."""

    @contextmanager
    def mixed(self, model: Any, shares: Shares) -> Iterator[None]:
        """Run with gates that are mixed with a gate that takes the window alone."""
        layers = decoder_layers(model)
        with ExitStack() as stack:
            for place, number in enumerate(self.layers):
                gate = layers[number].mixer.allocation_gate
                stack.callback(gate.register_forward_hook(_narrowing(place, shares)).remove)
            yield


def _narrowing(place: int, shares: Shares) -> Any:
    """Return a hook that mixes a gate, which reads the layer's normed input."""

    def narrow(_: nn.Module, arguments: tuple[Tensor], logits: Tensor) -> Tensor:
        return narrowed(logits, shares(place, arguments[0]))

    return narrow


def narrowed(
    logits: Float[Tensor, "rows time heads"], share: Float[Tensor, "#rows #time #heads"]
) -> Float[Tensor, "rows time heads"]:
    """Return the logits of a gate that is mixed by its share with a gate that takes the window alone."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    window = 1 - share.to(wide) * torch.sigmoid(-wide)  # sigmoid(-x) = 1 - sigmoid(x)
    return torch.logit(window, eps=torch.finfo(wide.dtype).eps).to(logits.dtype)


class AttentionUnits(MixedUnits):
    """KV heads of any causal LM of transformers, which read either everything or a window and the first tokens.

    Args:
        model: a causal LM.
        window: number of tokens that a token sees, itself included.
        sinks: number of first tokens that every later token sees.

    Raises:
        ValueError: the model has its own sliding window.
    """

    def __init__(self, model: nn.Module, window: int, sinks: int):
        modules = decoder_layers(model)
        if any(getattr(module, "sliding_window", None) for module in modules):
            raise ValueError(f"{type(model).__name__} has its own sliding window: run `hybridmem convert` on it first")
        self.window, self.sinks = window, sinks
        self.layers = list(range(len(modules)))
        config: Any = modules[0].config
        self.num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.window_and_sinks = (window, sinks)

    def sources_of(self, opened: Bool[Tensor, "layers heads"]) -> list[list[str]]:
        """Return the source of every KV head."""
        return [["full" if reads else "none" for reads in layer] for layer in opened.tolist()]

    @contextmanager
    def mixed(self, model: Any, shares: Shares) -> Iterator[None]:
        """Run with an attention function that mixes full and windowed attention."""
        own: dict[nn.Module, Tensor] = {}  # shares in the current pass

        def noting(place: int) -> Any:
            def note(module: nn.Module, positional: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
                own[module] = shares(place, positional[0] if positional else arguments.get("hidden_states"))

            return note

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
        ) -> tuple[Tensor, None]:
            whole = ALL_ATTENTION_FUNCTIONS["sdpa"]  # by name, so that a recorder outside the context sees the call
            full, _ = whole(module, query, key, value, attention_mask, **options)
            if module not in own:  # an image encoder's
                return full, None
            assert attention_mask is not None
            near = attention_mask & near_keys(attention_mask, self.window, self.sinks)
            local, _ = sdpa_attention_forward(module, query, key, value, near, **options)
            share = own[module]
            if share.shape[2] > 1:
                share = share.repeat_interleave(query.shape[1] // self.num_heads, dim=2)
            return torch.lerp(local, full, share[..., None].to(full.dtype)), None

        with ExitStack() as stack:
            for place, module in enumerate(decoder_layers(model)):
                hook = module.register_forward_pre_hook(noting(place), with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(attending_with(model, attend))
            yield


def near_keys(
    mask: Bool[Tensor, "rows 1 queries keys"], window: int, sinks: int
) -> Bool[Tensor, "rows 1 queries keys"]:
    """Return the keys in each query's window and the row's first tokens; padding is on the left.

    Args:
        mask: the keys that each query sees; the last query belongs to the last key.
        window: number of keys that a query sees, its own included.
        sinks: number of first tokens in the row, which every query sees.
    """
    queries, keys = mask.shape[2:]
    key = torch.arange(keys, device=mask.device)
    query = key[keys - queries :, None]
    first = mask[:, :, -1:].int().argmax(-1, keepdim=True)
    return (query - key < window) | (key < first + sinks)


def find_units(model: Any, source: str | None, window: int | None, sinks: int | None) -> Units:
    """Return the units of a model; `window` and `sinks`, if given, replace the model's.

    Args:
        model: the policy's model, without adapters around it.
        source: source of a closed unit; None: `memory` if every layer has one, otherwise `none`.
        window: number of tokens that a closed unit sees; None keeps the model's.
        sinks: number of first tokens that it sees; None keeps the model's.

    Raises:
        ValueError: the model has no units, lacks the source, or needs a window.
    """
    if not isinstance(model, HybridMemForCausalLM):
        if source == "memory":
            raise ValueError(f"source={source}, but {type(model).__name__} has no memory: convert it, or set none")
        if window is None:
            raise ValueError(f"attention_window is not set, and {type(model).__name__} has none: give the tokens")
        return AttentionUnits(model, window, 4 if sinks is None else sinks)
    config = model.config
    if "mah" in (config.layer_types or ()):
        fitted = config.attention_window, config.num_sink_tokens
        wanted = tuple(old if new is None else new for old, new in zip(fitted, (window, sinks), strict=True))
        config.attention_window, config.num_sink_tokens = wanted
        source = source or _own_source(model)
        units = HeadUnits(model, source)
        if source == "memory" and wanted != fitted:
            raise ValueError(
                f"attention_window={wanted[0]} and num_sink_tokens={wanted[1]}, but the model's memories were fitted "
                f"to {fitted[0]} and {fitted[1]}: remove both settings, or fit the memories again"
            )
        return units
    if "mag" in (config.layer_types or ()):
        if window is not None or sinks is not None:
            raise ValueError("attention_window and num_sink_tokens are for converted models: remove them for mag")
        return GateUnits(model)
    if "mac" in (config.layer_types or ()):
        raise ValueError(
            "layers of mac have no units to allocate: no gate divides window and memory, because recalled tokens are "
            "keys of its attention, whose output scales the memory's; use mag, or a model of `hybridmem convert`"
        )
    raise ValueError(
        f"layers of {', '.join(sorted(set(config.layer_types or ())))} have no units to allocate: use mag, or a model "
        "of `hybridmem convert`"
    )


def _own_source(model: HybridMemForCausalLM) -> str:
    """Return `memory` if every layer has one, otherwise `none`."""
    mixers = [layer.mixer for layer in decoder_layers(model) if isinstance(layer.mixer, HeadMixer)]
    return "memory" if all(mixer.memory is not None for mixer in mixers) else "none"
