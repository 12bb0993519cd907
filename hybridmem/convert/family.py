"""Code shared by the model families: sizes, rotary embedding, weight names, and checks for unsupported features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from hybridmem.model.configuration import ROPE_TYPES

Settings = dict[str, Any]

# Settings that change the computation and that HybridMem does not implement.
UNSUPPORTED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
    "query_pre_attn_scalar",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "use_parallel_residual",
    "parallel_attn",
    "attention_chunk_size",
    "no_rope_layers",
    "cross_attention_layers",
    "partial_rotary_factor",
    "quantization_config",
)
NEUTRAL: tuple[Any, ...] = (None, False, 0, 1, [], {})
SAME = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range", "attention_dropout"),
    *("use_cache", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"),
]
PARTS = {
    "self_attn.": "mixer.",
    "mlp.": "feed_forward.",
    "input_layernorm.": "mixer_norm.",
    "post_attention_layernorm.": "feed_forward_norm.",
}


@dataclass(frozen=True)
class Family:
    """Convertible model type of transformers.

    Args:
        model_type: name in transformers.
        settings: function from its configuration to the HybridMemConfig settings that differ between families.
    """

    model_type: str
    settings: Callable[[PreTrainedConfig], Settings]


def shared_settings(config: PreTrainedConfig) -> Settings:
    """Return the HybridMemConfig settings shared by all families."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = {name: getattr(config, name) for name in SAME if getattr(config, name, None) is not None}
    rope = dict(config.rope_parameters, partial_rotary_factor=1.0)
    return dict(settings, head_dim=head_dim, rope_parameters=rope, partial_rotary_factor=1.0)


def sliding_layers(config: PreTrainedConfig) -> list[int | None] | None:
    """Return the sliding window of each layer in `layer_types`, or None if no layer has one."""
    kinds = config.layer_types
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    return windows if any(windows) else None


def refuse_unsupported(config: PreTrainedConfig) -> None:
    """Raise a ValueError if the model uses a feature that a converted model cannot reproduce."""
    for name in UNSUPPORTED:
        if getattr(config, name, None) not in NEUTRAL:
            raise ValueError(f"{name}={getattr(config, name)!r} is not supported: choose a model without it")
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act={config.hidden_act!r} is not supported: choose a model with silu")
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types holds {kind!r}, which is not supported: choose a model with plain attention")
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is not supported: choose a model with {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor") not in (None, 1):
        share = rope["partial_rotary_factor"]
        raise ValueError(f"partial_rotary_factor={share} is not supported: choose a model that rotates whole heads")


def new_name(name: str) -> str | None:
    """Return the name of a base model's tensor in the converted model; None for tensors that are not weights."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if name.startswith("model.layers."):
        number, _, rest = name.removeprefix("model.layers.").partition(".")
        for old, new in PARTS.items():
            if rest.startswith(old):
                return f"model.layers.{number}.{new}{rest.removeprefix(old)}"
    return name
