"""Language model with decoder layers of any variant, and its integration into transformers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import ShortRangeAttention
from .cache import check_layers
from .configuration import HybridMemConfig, check_head_sources
from .convolution import ShortConvolution
from .heads import HeadMixer
from .memory import HeadMemory, NeuralMemory, WriteRouter, norm_layer
from .mixers import AttentionMixer, ContextMixer, GateMixer, LayerMixer, MemoryMixer
from .sequence import (
    PADDING,
    HeadChoice,
    LastDocument,
    TokenSequence,
    check_mask,
    compact_rows,
    inverse_frequencies,
    known_true,
    number_documents,
    pretrained_rotary_angles,
    read_documents,
    rotary_angles,
    rows_starting_afresh,
)

MIXERS = {
    "mac": ContextMixer,
    "mag": GateMixer,
    "mal": LayerMixer,
    "lmm": MemoryMixer,
    "swa": AttentionMixer,
    "full": AttentionMixer,
    "mah": HeadMixer,
}


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, config: HybridMemConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Float[Tensor, "batch time hidden"]) -> Float[Tensor, "batch time hidden"]:
        """Transform each token."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class HybridMemLayer(GradientCheckpointingLayer):
    """Decoder layer: the variant's mixer and a feed-forward layer, both pre-norm with a residual."""

    def __init__(self, config: HybridMemConfig, layer_idx: int):
        super().__init__()
        self.layer_idx, self.variant = layer_idx, config.layer_type(layer_idx)
        # accelerate's hooks load a module's weights when the module is called. mac reads the weights of its submodules
        # directly, and a deep memory passes its weights as a list, so both bypass the hooks.
        self.needs_all_weights = self.variant == "mac" or config.memory_depth > 1
        self.mixer_norm = norm_layer(config, config.hidden_size)
        self.mixer = MIXERS[self.variant](config, layer_idx)
        self.feed_forward_norm = norm_layer(config, config.hidden_size)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch time hidden"],
        sequence: TokenSequence,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "batch time hidden"]:
        """Mix tokens, then transform each one; read the layer's state from the cache and store the next one."""
        if self.needs_all_weights and not hidden_states.is_meta and any(w.is_meta for w in self.mixer.parameters()):
            raise ValueError(
                f"layer {self.layer_idx} ({self.variant}) is offloaded weight by weight but needs all weights at once: "
                "place it on a device, or offload it with accelerate's preload_module_classes=['HybridMemLayer']"
            )
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        mixed, state, _ = self.mixer(self.mixer_norm(hidden_states), None if cache is None else cache.state, sequence)
        if cache is not None:
            cache.store(state, hidden_states.shape[1], sequence)
        hidden_states = hidden_states + mixed
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class HybridMemPreTrainedModel(PreTrainedModel):
    """Weight initialisation and declaration of the transformers features that the model supports."""

    config: HybridMemConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("HybridMemLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = (r"\.mixer\.memory\.",)  # memories of heads whose source has changed
    _is_stateful = True  # assisted generation would need to undo writes
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": HybridMemLayer,
        "attentions": [OutputRecorder(mixer, index=2) for mixer in set(MIXERS.values())],
    }

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, together with code that lets AutoModel and AutoModelForCausalLM load the folder."""
        self.set_auto_map()
        super().save_pretrained(*args, **kwargs)

    def set_auto_map(self) -> None:
        """Record in the configuration the classes that AutoModel and AutoModelForCausalLM load from the folder."""
        classes = HybridMemModel, HybridMemForCausalLM
        self.config.auto_map = {cls._auto_class: f"{__name__.split('.')[-1]}.{cls.__name__}" for cls in classes}

    def set_head_sources(self, sources: list[list[str]]) -> None:
        """Change the sources of the KV heads of `mah` layers, and record the change in the configuration.

        Args:
            sources: for each layer, a list of `full`, `memory` or `none` for its KV heads; empty for other variants.

        Raises:
            ValueError: `sources` has the wrong shape or an unknown name.
        """
        check_head_sources(sources, self.config)
        self.config.head_sources = [list(row) for row in sources]

    @contextmanager
    def head_sources(
        self,
        sources: list[list[str]] | None = None,
        full_share: Float[Tensor, "rows layers kv_heads"] | float | None = None,
    ) -> Iterator[None]:
        """Change the sources of the KV heads of `mah` layers temporarily, inside the context.

        Args:
            sources: as in `set_head_sources`; None: the configuration's sources.
            full_share: for each row (or for all rows, if it has one row) the share of `full` in a head's output; the
                rest comes from the head's source. 1 and 0 select, numbers in between mix. Caches then hold all keys as
                well as the other source's state, so that a head may change its share from call to call. The number 1.0
                means a share of 1 everywhere and skips the other source's output.

        Raises:
            ValueError: `sources` or `full_share` has the wrong shape.
        """
        config, decoder = self.config, self.base_model
        if sources is not None:
            check_head_sources(sources, config)
        wanted = (config.num_hidden_layers, config.num_key_value_heads)
        all_full = isinstance(full_share, float)
        share = torch.ones(1, *wanted, device=self.device) if isinstance(full_share, float) else full_share
        if isinstance(full_share, float) and full_share != 1:
            raise ValueError(f"full_share={full_share} must be 1.0, or a tensor of (rows, layers, KV heads)")
        if share is not None and share.shape[1:] != wanted:
            raise ValueError(
                f"full_share must be (rows, layers, KV heads) = (…, {wanted[0]}, {wanted[1]}), got {tuple(share.shape)}"
            )
        before, decoder.head_choice = decoder.head_choice, HeadChoice(sources, share, all_full)
        try:
            yield
        finally:
            decoder.head_choice = before

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For custom code, transformers skips modules without own parameters, as if they had been loaded. HybridMem's
        # modules also initialise parameters of their children. Loaded tensors are still skipped one by one.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ShortRangeAttention):
            if module.persistent_tokens is not None:
                init.normal_(module.persistent_tokens, std=std)
            if module.convolution is not None:
                widths = (module.heads * module.head_dim, module.kv_heads * module.head_dim)
                self._init_look_back(module.qkv_proj.weight, module.convolution, widths, module.head_dim)
        elif isinstance(module, GateMixer):
            init.zeros_(module.allocation_gate.weight)
            # Embeddings start small. At 1, the normalised branches would dominate them.
            init.constant_(module.attention_norm.weight, 0.2)
            init.constant_(module.memory_norm.weight, 0.2)
        elif isinstance(module, NeuralMemory):
            self._init_memory(module)
        elif isinstance(module, HeadMemory):
            module.initialize()
        elif isinstance(module, WriteRouter):
            init.zeros_(module.weight)
            init.ones_(module.bias)

    def _init_look_back(
        self, qkv: Tensor, convolution: ShortConvolution, widths: tuple[int, int], head_dim: int
    ) -> None:
        """Initialise attention or memory as an induction head: a lookup of the token that followed the same context.

        A channel of a query holds one of the last tokens, the same channel of a key the token before that, and a value
        the current token; queries and keys share their projection. A query therefore matches the keys of earlier
        tokens with similar predecessors, and reads the value there: the next token, if the text repeats itself.
        """
        queries, keys = widths
        kernel = convolution.weight.shape[1]
        if not getattr(qkv, "_is_hf_initialized", False):
            shared = qkv[queries : queries + keys].unflatten(0, (-1, head_dim))
            qkv[:queries] = shared.repeat_interleave(queries // keys, dim=0).flatten(0, 1)
        back = torch.arange(len(qkv)) % head_dim % max(1, kernel - 1)
        back[queries : queries + keys] += 1
        back[queries + keys :] = 0
        taps = torch.randn(convolution.weight.shape, device=convolution.weight.device) * 0.1
        taps[torch.arange(len(qkv)), kernel - 1 - back] += 1
        init.copy_(convolution.weight, taps)

    def _init_memory(self, memory: NeuralMemory) -> None:
        """Initialise with small writes and slow forgetting: half-lives range from tens to thousands of tokens."""
        heads = memory.heads
        alpha = -torch.linspace(4, 8, heads) if heads > 1 else torch.tensor([-6.0])
        # The tokens of a deep memory's chunk take gradients at the same weights, so they share one token's step.
        gentle = math.log(self.config.memory_chunk_size) if self.config.memory_depth > 1 else 0.0
        write = torch.full((heads,), -gentle)
        eta = torch.zeros(heads) if memory.eta_depends_on_token else torch.zeros(0)
        init.normal_(memory.gate_proj.weight, std=self.config.initializer_range)
        init.copy_(memory.gate_proj.bias, torch.cat((alpha, write, eta)))
        if memory.eta_logit is not None:
            init.zeros_(memory.eta_logit)
        for weight in memory.initial_weights:
            init.normal_(weight, std=weight.shape[1] ** -0.5 * 0.5)
        if memory.convolution is not None:
            self._init_look_back(memory.qkv_proj.weight, memory.convolution, (memory.inner, memory.inner), memory.dim)


class HybridMemModel(HybridMemPreTrainedModel):
    """Decoder without a language modelling head."""

    def __init__(self, config: HybridMemConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(HybridMemLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = norm_layer(config, config.hidden_size)
        self.has_attention = any(layer.variant != "lmm" for layer in self.layers)
        self.gradient_checkpointing = False
        self.head_choice: HeadChoice | None = None
        self.pretrained_rope = None if config.rope_parameters is None else inverse_frequencies(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows time"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch time hidden"] | None = None,
        use_cache: bool | None = None,
        document_ids: Int[Tensor, "batch time"] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder on tokens, continuing from `past_key_values` if given.

        Args:
            input_ids, inputs_embeds: exactly one of the two.
            attention_mask: 0 for padding, over these tokens or over all tokens so far; padding is skipped.
            position_ids: rotary positions; by default they count all tokens from the first one read. Only distances
                matter. As in transformers, a jump starts a new document if neither a mask nor a cache (not even an
                empty one) is given.
            past_key_values: the streaming state, which this call advances.
            document_ids: the document of each token; a change of id starts from an empty state. With a cache, ids
                continue from call to call. -1 is padding.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if not inputs_embeds.shape[1]:
            raise ValueError("input_ids is empty: give at least one token, such as the tokenizer's bos")
        if past_key_values is None:
            jumps = position_ids
            past_key_values = DynamicCache(config=self.config) if use_cache else None
        else:
            jumps = None  # positions then only place the tokens and start no documents
        sequence = self._sequence(inputs_embeds, attention_mask, position_ids, jumps, past_key_values, document_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(hidden_states, sequence, past_key_values=past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _sequence(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        jumps: Tensor | None,
        past_key_values: Cache | None,
        document_ids: Tensor | None,
    ) -> TokenSequence:
        """Compute documents, padding and positions, once for all layers."""
        shape = (inputs_embeds.shape[0], inputs_embeds.shape[1])
        past = 0
        last: LastDocument | None = None
        if past_key_values is not None:
            check_layers(past_key_values, self.config.layer_types or [])
            first: Any = past_key_values.layers[0]
            past, last = first.seen_tokens, first.last_document
        check_mask(attention_mask, shape)
        decodes = (
            shape[1] == 1
            and past > 0
            and document_ids is None
            and not torch.is_grad_enabled()
            and (attention_mask is None or known_true(attention_mask[:, -1].all()))
            and not torch.compiler.is_compiling()
        )
        if decodes:
            if last is not None:
                last = LastDocument(last.id.clamp(min=0), last.number)
            documents = None if last is None else last.number[:, None]
            angles = self._angles(position_ids, past, inputs_embeds)
            return TokenSequence(
                *angles, documents, last_document=last, past=past, heads=self.head_choice, decodes=True
            )
        documents = read_documents(shape, document_ids, attention_mask, jumps, None if last is None else last.id)
        mask = fresh_rows = compaction = None
        if documents is not None and past_key_values is None and known_true((documents == documents[:, :1]).all()):
            documents = None  # each row is one new document, so there is nothing to separate
        if documents is not None:
            if past and last is None:  # tokens read without document ids belong to document 0
                last = LastDocument(torch.zeros_like(documents[:, 0]), torch.zeros_like(documents[:, 0]))
            mask = documents != PADDING
            mask = None if known_true(mask.all()) else mask
            if mask is not None:
                begun = torch.zeros_like(mask[:, 0]) if last is None else last.id != PADDING
                compaction = compact_rows(mask, begun)
            fresh_rows = rows_starting_afresh(documents, last)
            documents, last = number_documents(documents, mask, fresh_rows, last)
        angles = self._angles(position_ids, past, inputs_embeds)
        return TokenSequence(*angles, documents, mask, fresh_rows, compaction, last, past, self.head_choice)

    def _angles(
        self, position_ids: Tensor | None, past: int, inputs_embeds: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return cosine and sine of the rotary embedding at every token; None if no layer has attention."""
        if not self.has_attention:
            return None, None
        if position_ids is None:
            position_ids = past + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        config, dtype = self.config, inputs_embeds.dtype
        if self.pretrained_rope is None:
            return rotary_angles(position_ids, config.rotary_dim, config.rope_theta, dtype)
        return pretrained_rotary_angles(position_ids, *self.pretrained_rope, config.max_position_embeddings, dtype)


class HybridMemForCausalLM(HybridMemPreTrainedModel, GenerationMixin):
    """Decoder with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HybridMemConfig):
        super().__init__(config)
        self.model = HybridMemModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                "cache_implementation='quantized' only supports keys and values, but a HybridMem cache also holds "
                "memory states: leave cache_implementation unset"
            )
        return super()._prepare_cache_for_generation(generation_config, *args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Reject continuous batching (`generate_batch`): it pages keys and values, and a memory's state has no pages.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "cache_implementation='paged' (continuous batching, generate_batch) only supports keys and values, but a "
            "HybridMem cache also holds memory states: leave it unset and call generate on a left-padded batch"
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows time"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch time hidden"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Int[Tensor, "batch time"] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return next-token logits, and the loss if `labels` (or `shift_labels`, already shifted by one) are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            document_ids=document_ids,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


HybridMemModel.register_for_auto_class("AutoModel")
HybridMemForCausalLM.register_for_auto_class("AutoModelForCausalLM")
