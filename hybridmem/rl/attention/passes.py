"""Contexts around a model's forward passes: another attention function, and the tokens of each pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxtyping import Bool
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
IMPLEMENTATION = "hybridmem_swapped"

AttentionMaskInterface.register(
    IMPLEMENTATION, lambda *args, **kwargs: sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
)


class NewTokens(NamedTuple):
    """Tokens that a forward pass reads."""

    past: int  # tokens in the cache
    length: int  # tokens of each row
    mask: Bool[Tensor, "rows length"] | None  # False for padding; None: no padding


@contextmanager
def before_passes(model: Any, begin: Callable[[NewTokens], None]) -> Iterator[None]:
    """Call a function with the tokens of each forward pass before it begins."""

    def note(_: nn.Module, positional: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        named = [arguments.get("input_ids"), arguments.get("inputs_embeds")]
        count = next(tokens for tokens in (*positional, *named) if tokens is not None).shape[1]
        cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
        past = 0 if cache is None else cache.get_seq_length()
        begin(NewTokens(past, count, None if mask is None else mask[:, -count:].bool()))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def attending_with(model: Any, function: AttentionFunction) -> Iterator[None]:
    """Run a model with an attention function, which always gets sdpa's mask; the model is restored on exit.

    Args:
        model: a causal LM of transformers.
        function: called as the functions in transformers' registry are. A context inside this one, of any model,
            replaces it.
    """
    before, outer = model.config._attn_implementation, ALL_ATTENTION_FUNCTIONS.get(IMPLEMENTATION)
    ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = function
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        model.set_attn_implementation(before)
        if outer is None:
            del ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
        else:
            ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] = outer
