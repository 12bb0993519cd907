"""transformers' causal LMs as baselines: built from a configuration, and read document by document.

The state of a recurrent model of transformers cannot restart within a row. Every document of a packed row is therefore
read as a row of its own, from an empty state, as `document_ids` do inside HybridMem's models:

    row       7 7 7 7 7 7 9 9 4 4 4 4
    passes    7 7 7 7 7 7               documents of 5 to 8 tokens
              4 4 4 4                   of 3 and 4
              9 9                       of 2

A pass reads documents of similar lengths, padded on the right to the longest of them. All passes together read fewer
than twice as many tokens as the rows hold.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig


def check_peer(config: PreTrainedConfig) -> None:
    """Raise a ValueError if transformers has no causal LM that can be trained from this configuration."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"config: transformers has no causal LM for {type(config).__name__}; set config.class_path to the "
            "configuration of one, such as transformers.Mamba2Config"
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "config.output_router_logits=true asks for the router's loss, which PretrainModule does not add; set it to "
            "false"
        )


def build_peer(config: PreTrainedConfig) -> Any:
    """Build the causal LM of a transformers configuration, with random weights."""
    model: Any = AutoModelForCausalLM.from_config(config)
    model.get_input_embeddings().padding_idx = None  # the text may use the configuration's pad_token_id
    return model


def set_attention(model: Any, attn_implementation: str) -> None:
    """Choose the implementation of attention in a model that has attention."""
    if model._supports_sdpa or model._supports_flash_attn or model._supports_flex_attn:
        model.set_attn_implementation(attn_implementation)


def document_logits(
    model: Any, document_ids: Int[Tensor, "batch time"] | None, **inputs: Shaped[Tensor, "batch time *rest"]
) -> Float[Tensor, "batch time vocab"]:
    """Return the logits of every token, given the earlier tokens of its document.

    Args:
        model: causal LM of transformers.
        document_ids: the document of each token; padding counts as a document. None: every row is one document.
        inputs: `input_ids` or `inputs_embeds`.
    """
    if document_ids is None or bool((document_ids == document_ids[:, :1]).all()):
        return model(**inputs, use_cache=False).logits
    logits, places = [], []
    for tokens, inside in _passes(document_ids):
        read = {name: x.flatten(0, 1)[tokens] for name, x in inputs.items()}
        logits.append(model(**read, use_cache=False).logits[inside])
        places.append(tokens[inside])
    order = torch.cat(places).argsort()
    return torch.cat(logits)[order].unflatten(0, document_ids.shape)


def _passes(
    document_ids: Int[Tensor, "batch time"],
) -> Iterator[tuple[Int[Tensor, "documents longest"], Bool[Tensor, "documents longest"]]]:
    """Yield each pass's tokens, as places in the flattened rows, and True for tokens before the padding."""
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    first = starts.flatten().nonzero().squeeze(1)
    lengths = torch.diff(first, append=first.new_tensor([starts.numel()]))
    sizes = torch.bucketize(lengths, 2 ** torch.arange(63, device=first.device))
    for size in sizes.unique().flip(0):
        chosen = sizes == size
        within = torch.arange(int(lengths[chosen].max()), device=first.device)
        inside = within < lengths[chosen].unsqueeze(1)
        yield (first[chosen].unsqueeze(1) + within).clamp(max=starts.numel() - 1), inside
