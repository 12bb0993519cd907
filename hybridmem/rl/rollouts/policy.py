"""Policies: causal LMs with the tokenisation of their data."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedTokenizerBase

from hybridmem.rl.attention.action import Action

from .completions import Completions
from .prompts import Prompt, PromptBatch, Times, batch_prompts, vision_positions
from .random_streams import Generators
from .sampling import Sampling, evaluating, sample

Example = dict[str, Any]


@runtime_checkable
class PromptData(Protocol):
    """Tokenisation of examples, prompts, observations and answers."""

    tokenizer: Any

    @property
    def pad_id(self) -> int:
        """Return the id of the padding token."""
        ...

    @property
    def end_id(self) -> int:
        """Return the id of the token that ends a response."""
        ...

    def prompt(self, example: Example) -> Prompt:
        """Return the tokenised prompt of an example, with its images."""
        ...

    def observation_tokens(self, observation: str) -> list[int]:
        """Return the tokens of an environment's observation, as placed between two turns."""
        ...

    def answer_and_mask(self, prompt: list[int], example: Example) -> tuple[list[int], list[bool]]:
        """Return the tokens of an example's answer, and a mask of the policy's own tokens among them."""
        ...


def with_adapters(model: Any, settings: dict[str, Any]) -> Any:
    """Wrap the model in PEFT with new LoRA adapters.

    Raises:
        ValueError: LoraConfig rejects the settings.
    """
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(model, LoraConfig(**settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora={settings} is not accepted by PEFT's LoraConfig: {error}") from error


def lower_precision(model: torch.nn.Module, name: str) -> None:
    """Convert a model's weights to a floating-point type of torch; memories keep theirs.

    Raises:
        ValueError: torch has no such type.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={name!r} is not a floating-point type of torch; use float32, bfloat16 or float16")
    for place, parameter in model.named_parameters():
        if ".memory." not in place:
            parameter.data = parameter.data.to(dtype)


def disable_dropout(model: Any) -> bool:
    """Disable dropout permanently, also in adapters; return True if any was on.

    With dropout, the scores of responses would not come from the policy that sampled them, and importance ratios would
    differ from 1 before the first step.
    """
    was_on = False
    for module in model.modules():
        rates = [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]
        rates += ["p"] if isinstance(module, torch.nn.modules.dropout._DropoutNd) else []
        was_on |= any(getattr(module, name) for name in rates)
        for name in rates:
            setattr(module, name, 0.0)
    model.train(model.is_activation_checkpointing)  # transformers checkpoints activations in training mode only
    return was_on


class Policy:
    """Causal LM of transformers with its data and frozen companions, as sampling and scoring need them.

    Args:
        model: the causal LM, with or without PEFT.
        data: tokenises examples.
        adapted: True if PEFT adapters are trained instead of all weights.
        sharded: True if the weights are sharded over ranks.
    """

    def __init__(self, model: Any, data: PromptData, adapted: bool = False, sharded: bool = False):
        self.model, self.data = model, data
        self.adapted, self.sharded = adapted, sharded
        self.frozen: dict[str, Any] = {}  # the objectives' frozen models, such as "reference" or "teacher"
        self.learned: dict[str, torch.nn.Module] = {}  # parameters of objectives, by family

    @property
    def base_model(self) -> Any:
        """Return the model without PEFT adapters around it."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.model.parameters()).device

    @property
    def eos_token_ids(self) -> list[int]:
        """Return the tokens that end a response, from the tokenizer and from the model's generation config."""
        own = self.model.generation_config.eos_token_id
        own = [] if own is None else own if isinstance(own, list) else [own]
        return sorted({self.data.end_id, *own})

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the data's tokenizer."""
        return self.data.tokenizer

    def frozen_model(self, use: str) -> Any:
        """Move a frozen model to the policy's device and return it."""
        self.frozen[use] = self.frozen[use].to(self.device)
        return self.frozen[use]

    def shared_times(self, times: int | Times) -> int | Times:
        """Return how many responses may share one prefill of their prompt.

        The answer is 1 under activation checkpointing, which forbids a cache, and in sharded models, where gradients
        through a cache bypass the hooks that gather a layer's weights.
        """
        return 1 if self.sharded or self.model.is_activation_checkpointing else times

    def prompt_batch(self, prompts: list[Prompt]) -> PromptBatch:
        """Return prompts as a padded batch, with position ids if the model needs them."""
        batch = batch_prompts(prompts, self.data.pad_id, self.device)
        if batch.image_grid_thw is None:
            return batch
        return batch._replace(position_ids=vision_positions(self.model, batch))

    def answer(
        self,
        prompts: PromptBatch,
        num_generations: int,
        sampling: Sampling,
        generator: Generators = None,
        actions: Sequence[Action] = (),
    ) -> Completions:
        """Sample `num_generations` responses to each prompt in evaluation mode (see `sample`)."""
        with evaluating(self.model):
            ends, pad = self.eos_token_ids, self.data.pad_id
            return sample(self.model, prompts, num_generations, sampling, ends, pad, generator, actions)

    def demonstrate(self, examples: list[Example]) -> tuple[PromptBatch, Completions]:
        """Return the examples' prompts, and their answers in the form of sampled completions."""
        prompts = [self.data.prompt(example) for example in examples]
        answers = [
            self.data.answer_and_mask(prompt.tokens, example) for prompt, example in zip(prompts, examples, strict=True)
        ]
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence([torch.tensor(x, device=self.device) for x in column], True, padding)
            for column, padding in zip(zip(*answers, strict=True), (self.data.pad_id, False), strict=True)
        )
        never = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        return self.prompt_batch(prompts), Completions(ids, mask, never, torch.zeros_like(ids, dtype=torch.float32))

    def texts_and_ids(self, completions: Completions) -> tuple[list[str], list[list[int]]]:
        """Return each response's text without EOS, and its tokens including EOS."""
        ends = self.eos_token_ids
        ids = [row[mask].tolist() for row, mask in zip(completions.ids, completions.mask, strict=True)]
        bare = [[token for token in row if token not in ends] for row in ids]
        return self.tokenizer.batch_decode(bare), ids
