"""Streaming states of layers, as layers of transformers' caches.

`generate` builds a cache from the configuration's layer types. The classes below are registered for HybridMem's types,
in dynamic and static caches. A layer's state is a nested tuple of tensors. Its size is independent of the number of
tokens read, except for the keys of `full` layers.
"""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from .sequence import LastDocument, TokenSequence
from .state import map_state


class StreamingLayer(CacheLayerMixin):
    """Cache layer with the state of one model layer, the number of tokens seen, and each row's current document."""

    is_croppable = False  # writes to a memory cannot be undone
    is_compileable = False
    supports_early_init = False

    def __init__(self, **_: Any):
        super().__init__()
        self.state: Any = None
        self.seen_tokens = 0
        self.last_document: LastDocument | None = None

    def store(self, state: Any, tokens: int, sequence: TokenSequence) -> None:
        """Store the state after `tokens` more tokens."""
        self.state = state
        self.seen_tokens += tokens
        self.is_initialized = True
        self.last_document = sequence.last_document

    def get_seq_length(self) -> int:
        """Return the number of tokens read so far."""
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return mask sizes as if every token were kept; the model builds its own masks."""
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the length is unbounded."""
        return -1

    @property
    def batch_size(self) -> int:
        """Return the number of rows in the state, -1 before the first token."""
        tensors = self.tensors()
        return len(tensors[0]) if tensors else -1

    def tensors(self) -> list[Tensor]:
        """List all tensors of the state."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        map_state(note, (self.state, self.last_document))
        return found

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first `store` initialises the layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise a TypeError: this layer keeps a state, not growing keys and values."""
        raise TypeError(f"{type(self).__name__} holds a streaming state; only HybridMem layers can use it")

    def reset(self) -> None:
        """Clear the state."""
        self.state, self.last_document, self.seen_tokens, self.is_initialized = None, None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Raise an error unless `tokens_to_remove` is 0."""
        if tokens_to_remove:
            raise ValueError(
                "a neural memory cannot be rolled back, so assisted generation and cache cropping are not supported: "
                "decode without them"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: Any) -> None:
        """Repeat each row for several continuations of one prompt; `repeats` is one count or one per row."""
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`."""
        self._apply(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move the state to the CPU until it is needed."""
        self._apply(self._remember_device)

    def prefetch(self) -> None:
        """Move an offloaded state back to its device."""
        self._apply(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _remember_device(self, tensor: Tensor) -> Tensor:
        self.device = tensor.device if tensor.device.type != "cpu" else getattr(self, "device", tensor.device)
        return tensor.to("cpu", non_blocking=True)

    def _apply(self, function: Any) -> None:
        self.state, self.last_document = map_state(function, (self.state, self.last_document))


def _register(variant: str) -> type[StreamingLayer]:
    """Create the cache layer class that transformers looks up by layer type.

    Defining the class registers it for dynamic caches. Static caches use it too, as for transformers' own linear
    attention: except for the keys of `full` layers, the state has a constant size.
    """
    layer = type(
        f"{variant.capitalize()}StreamingLayer", (StreamingLayer,), {"_layer_type": variant, "__module__": __name__}
    )
    STATIC_LAYER_TYPE_MAPPING[variant] = layer
    return layer


(
    MacStreamingLayer,
    MagStreamingLayer,
    MalStreamingLayer,
    LmmStreamingLayer,
    SwaStreamingLayer,
    FullStreamingLayer,
    MahStreamingLayer,
) = (_register(variant) for variant in ("mac", "mag", "mal", "lmm", "swa", "full", "mah"))


def check_layers(cache: Any, layer_types: list[str]) -> None:
    """Raise a TypeError unless `cache` has a streaming layer of the right type for every layer of the model."""
    layers = getattr(cache, "layers", None) or []
    if [getattr(layer, "_layer_type", None) for layer in layers] != list(layer_types):
        kinds = ", ".join(dict.fromkeys(type(layer).__name__ for layer in layers)) or "no layers"
        raise TypeError(
            f"past_key_values is a {type(cache).__name__} with {kinds}, which cannot hold the states of layer_types="
            f"{layer_types}; build it with DynamicCache(config=model.config)"
        )


def state_bytes(cache: Any) -> int:
    """Return the size in bytes of all tensors in a cache of any model of transformers."""
    leaves = tree_leaves([vars(layer) for layer in cache.layers])
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
