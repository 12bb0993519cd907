"""Configuration of hybrids of neural memory and short-range attention."""

from importlib.util import find_spec
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, configuration_utils

if find_spec("hybridmem_kernels") is None:
    # An exported folder contains this file and the model's files, which need the installed operators. This file is
    # loaded first; without this error, transformers would name a missing import instead of the package.
    raise ModuleNotFoundError("a HybridMem model needs the package hybridmem: pip install hybridmem")

VARIANTS = ("mac", "mag", "mal", "lmm", "swa", "full", "mah")
MEMORY_VARIANTS = ("mac", "mag", "mal", "lmm")
MOST_LAYERS = 10_000  # a typo of a million layers would take an hour to build
MEMORY_STEPS = ("certified", "damped", "raw")
HEAD_SOURCES = ("full", "memory", "none")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# On resuming, transformers' Trainer reads config.json through its base class, which accepts only these layer types.
configuration_utils.ALLOWED_ATTN_LAYER_TYPES += tuple(
    variant for variant in VARIANTS if variant not in configuration_utils.ALLOWED_ATTN_LAYER_TYPES
)


@strict  # makes transformers run the validate_* methods below, also before saving
class HybridMemConfig(PreTrainedConfig):
    """Configuration of a HybridMem model, with names from Titans (arXiv 2501.00663) and transformers.

    Args:
        vocab_size: number of tokens; the default is the byte tokenizer's 256 bytes and three special tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the SwiGLU feed-forward layers.
        num_hidden_layers: number of decoder layers.
        num_attention_heads, num_key_value_heads, head_dim: shape of attention; fewer key-value heads than heads
            means grouped-query attention.
        max_position_embeddings: the longest text that evaluation tools should feed at once. The model has no limit.
        rope_theta: base of the rotary embedding.
        partial_rotary_factor: share of each head's channels that rotate with the position. Persistent tokens have
            no position: their keys use only the other channels.
        variant: token mixer of a layer: `mac` memory as context, `mag` memory as gate, `mal` memory as layer,
            `lmm` memory alone, `swa` sliding-window attention alone, `full` causal attention alone, `mah` memory as
            heads, with a separate source for every KV head.
        layer_types: the variant of every layer; None fills the list with `variant`.
        head_sources: for each layer, the source of every KV head of `mah`, an empty list for layers of other types;
            None: all `full`. Every head sees the window and the document's first tokens. Beyond them, `full` reads
            all keys, `memory` reads a neural memory of the tokens that left the window, and `none` reads nothing.
        num_sink_tokens: first tokens of a document that heads of `mah` always see.
        sliding_windows: for each layer, the window of its `full` heads, the current token included; None: unlimited.
        attention_bias, attention_output_bias, mlp_bias: add a bias to q, k and v of `mah`, to its output projection,
            or to the feed-forward layers.
        qk_norm: normalise the queries and keys of `mah`, head by head, before the rotary embedding.
        rope_parameters: rotary embedding of a pretrained model in transformers' format: `rope_type` default, linear,
            llama3 or yarn, with the parameters of that type. None: rope_theta alone, in float64.
        attention_window: tokens that a token of mag, mal, swa and mah sees, itself included.
        attention_conv: apply the memory's short convolution to attention's q, k and v as well.
        attention_dropout: dropout on attention weights.
        segment_length: tokens per segment of mac; None: attention_window, so that all variants have the same range.
        num_persistent_tokens: learned tokens that attention always sees.
        memory_depth: 1 is an exact linear memory; 2 or more is an MLP of that many layers.
        memory_heads, memory_head_dim: the memory's heads, each with its own state.
        memory_expansion: width of a deep memory's hidden layers in multiples of memory_head_dim.
        memory_chunk_size: tokens processed at once. At depth 1 it affects only the speed; from depth 2 on, the tokens
            of a chunk take their gradients at the same weights.
        memory_step: bound on the write: `certified` keeps eta fixed per head and theta below
            2(1-eta)²/(1+eta), where no sequence of keys makes the state grow; `damped` bounds theta by 1-eta;
            `raw` by 1.
        memory_momentum, memory_forgetting: False disables the surprise's momentum or the forgetting gate.
        memory_conv_size: taps of the convolution on the memory's q, k, v; 1 disables it.
        memory_max_grad_norm: bound on a token's gradient, over all layers of a head, from depth 2 on.
        initializer_range: standard deviation of the initial weights.
        rms_norm_eps: added to mean squares.

    Raises:
        StrictDataclassClassValidationError: an invalid combination of settings; the message names the setting and the
            remedy (huggingface_hub.errors; its cause is a ValueError).
        StrictDataclassFieldValidationError: a value of the wrong type.
    """

    model_type = "hybridmem"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  Trainer adds a list to it

    vocab_size: int = 259
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    max_position_embeddings: int = 1_048_576
    rope_theta: int | float = 10_000.0
    partial_rotary_factor: int | float = 0.5
    variant: str = "mag"
    layer_types: list[str] | None = None
    head_sources: list[list[str]] | None = None
    num_sink_tokens: int = 4
    sliding_windows: list[int | None] | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_window: int = 256
    attention_conv: bool = False
    attention_dropout: int | float = 0.0
    segment_length: int | None = None
    num_persistent_tokens: int = 4
    memory_depth: int = 1
    memory_heads: int = 4
    memory_head_dim: int = 64
    memory_expansion: int = 1
    memory_chunk_size: int = 64
    memory_step: str = "certified"
    memory_momentum: bool = True
    memory_forgetting: bool = True
    memory_conv_size: int = 4
    memory_max_grad_norm: int | float | None = 1.0
    initializer_range: int | float = 0.02
    rms_norm_eps: int | float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} must be at most {MOST_LAYERS}")
        if self.layer_types is None:
            self.layer_types = [self.variant] * self.num_hidden_layers
        if self.segment_length is None:
            self.segment_length = self.attention_window
        if not all(str(key).isdigit() for key in self.id2label or ()):
            raise ValueError(f"id2label={self.id2label} must have numbers as keys")
        if isinstance(self.dtype, str) and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype={self.dtype!r} is not a torch dtype; use one such as bfloat16")
        if self.head_sources is None and "mah" in self.layer_types:
            self.head_sources = [
                ["full"] * self.num_key_value_heads if kind == "mah" else [] for kind in self.layer_types
            ]
        pretrained_rope = self.rope_parameters or kwargs.get("rope_scaling")
        super().__post_init__(**kwargs)
        if pretrained_rope and self.rope_parameters:
            self.rope_theta = self.rope_parameters["rope_theta"]
            self.partial_rotary_factor = self.rope_parameters.get("partial_rotary_factor", self.partial_rotary_factor)
        else:
            self.rope_parameters = None  # transformers' base class fills it in from rope_theta

    @property
    def rotary_dim(self) -> int:
        """Return the number of channels of a head that rotate, an even number."""
        return int(self.head_dim * self.partial_rotary_factor) // 2 * 2

    @property
    def is_pretrained(self) -> bool:
        """Return True if rotary embedding and norms reproduce the arithmetic of transformers' models bit for bit."""
        return self.rope_parameters is not None

    def layer_type(self, layer_idx: int) -> str:
        """Return the variant of a layer."""
        assert self.layer_types is not None
        return self.layer_types[layer_idx]

    @property
    def has_memory(self) -> bool:
        """Return True if any layer's variant has a `NeuralMemory`; memories of `mah` are listed in head_sources."""
        return any(kind in MEMORY_VARIANTS for kind in self.layer_types or ())

    def validate_layer_type(self) -> None:
        """Check the variants; the error of transformers' own check would also list foreign layer types."""
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} is unknown; choose one of {', '.join(VARIANTS)}")
        layer_types = self.layer_types or []
        for number, kind in enumerate(layer_types):
            if kind not in VARIANTS:
                raise ValueError(f"layer_types[{number}]={kind!r} is unknown; choose one of {', '.join(VARIANTS)}")
        if len(layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(layer_types)} layers but num_hidden_layers={self.num_hidden_layers}; "
                "make them equal"
            )

    def validate_head_sources(self) -> None:
        """Check the sources of `mah` and the base model's windows."""
        if self.num_sink_tokens < 0:
            raise ValueError(f"num_sink_tokens={self.num_sink_tokens} must be 0 or more")
        for name in ("head_sources", "sliding_windows"):
            layers = getattr(self, name)
            if layers is not None and len(layers) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} names {len(layers)} layers but num_hidden_layers={self.num_hidden_layers}; make them equal"
                )
        if self.head_sources is not None:
            check_head_sources(self.head_sources, self)
        for layer, window in enumerate(self.sliding_windows or ()):
            if window is not None and window < 1:
                raise ValueError(f"sliding_windows[{layer}]={window} must be at least 1, or null for no window")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters: rope_type={rope_type!r} is unknown; choose one of {', '.join(ROPE_TYPES)}"
            )

    def validate_shapes(self) -> None:
        """Check for positive sizes and divisibility."""
        positive = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "attention_window",
            "segment_length",
            "memory_depth",
            "memory_heads",
            "memory_head_dim",
            "memory_expansion",
            "memory_chunk_size",
            "memory_conv_size",
            "max_position_embeddings",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{name}={getattr(self, name)} must be below 2^31")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.num_persistent_tokens < 0:
            raise ValueError(f"num_persistent_tokens={self.num_persistent_tokens} must be 0 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is outside the vocabulary of {self.vocab_size} tokens; raise "
                "vocab_size or choose another token"
            )
        if not 0 <= self.partial_rotary_factor <= 1:
            raise ValueError(f"partial_rotary_factor={self.partial_rotary_factor} must be in [0, 1]")
        if "mag" in (self.layer_types or ()) and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads="
                f"{self.num_attention_heads} in mag, which has one gate per head"
            )

    def validate_memory(self) -> None:
        """Check the memory's settings."""
        if self.memory_step not in MEMORY_STEPS:
            raise ValueError(f"memory_step={self.memory_step!r} is unknown; choose one of {', '.join(MEMORY_STEPS)}")
        if self.memory_max_grad_norm is not None and not self.memory_max_grad_norm > 0:
            raise ValueError(f"memory_max_grad_norm={self.memory_max_grad_norm} must be above 0, or null for no bound")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout={self.attention_dropout} must be in [0, 1)")


def check_head_sources(sources: list[list[str]], config: HybridMemConfig) -> None:
    """Raise a ValueError unless `sources` names a source for exactly the KV heads of the `mah` layers."""
    if len(sources) != config.num_hidden_layers:
        raise ValueError(
            f"head_sources names {len(sources)} layers but num_hidden_layers={config.num_hidden_layers}; "
            "make them equal"
        )
    for layer, row in enumerate(sources):
        heads = config.num_key_value_heads if config.layer_type(layer) == "mah" else 0
        if len(row) != heads:
            reason = f"num_key_value_heads={heads}" if heads else f"the layer is {config.layer_type(layer)}, not mah"
            raise ValueError(f"head_sources[{layer}] names {len(row)} sources but {reason}; name {heads}")
        for head, source in enumerate(row):
            if source not in HEAD_SOURCES:
                raise ValueError(
                    f"head_sources[{layer}][{head}]={source!r} is unknown; choose one of {', '.join(HEAD_SOURCES)}"
                )


HybridMemConfig.register_for_auto_class()
