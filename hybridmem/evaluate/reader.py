"""Causal LM that reads texts in chunks through its cache, with measurements of time and bytes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from hybridmem.data.task_module import prompt_tokens
from hybridmem.model.cache import state_bytes

IGNORED = -100


@dataclass(frozen=True)
class Usage:
    """Cost of reading a text.

    Args:
        tokens: number of tokens in the text.
        seconds: time to read the text.
        state_bytes: bytes of the cache at the end of the text.
        growth: bytes added to the cache by each token of the text's second half.
    """

    tokens: int
    seconds: float
    state_bytes: int
    growth: float


@dataclass(frozen=True)
class Answer:
    """Greedy answer, with the cost of reading the prompt and the seconds per new token."""

    text: str
    usage: Usage
    seconds_per_token: float


class Reader:
    """Reader of `chunk_size` tokens at a time; a model with a state of constant size can read texts of any length.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        tokenizer: the model's tokenizer.
        chunk_size: number of tokens that each forward pass reads.
        end_ids: tokens that end an answer.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, chunk_size: int, end_ids: list[int]):
        self.model, self.tokenizer, self.chunk_size, self.end_ids = model, tokenizer, chunk_size, end_ids
        self.chat = tokenizer.chat_template is not None

    def prompt(self, text: str) -> list[int]:
        """Return a prompt's tokens, in the chat template if the tokenizer has one."""
        return prompt_tokens(self.tokenizer, self.chat, text)

    def count(self, text: str) -> int:
        """Return the number of a prompt's tokens."""
        return len(self.prompt(text))

    @torch.inference_mode()
    def answer(self, prompt: list[int], max_new_tokens: int) -> Answer:
        """Read a prompt and answer it greedily, up to an end token or `max_new_tokens`."""
        watch, cache = Stopwatch(self.model.device), self._new_cache()
        *_, (_, logits, usage) = self._read(torch.tensor(prompt), cache, watch)
        written: list[int] = []
        while True:
            token = int(logits[-1].argmax())
            if token in self.end_ids:
                break
            written.append(token)
            if len(written) == max_new_tokens:
                break
            logits = self._forward(torch.tensor([token]), cache, keep=1)
        seconds = watch.seconds() - usage.seconds
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return Answer(text, usage, seconds / max(1, len(written)))

    @torch.inference_mode()
    def predict(
        self, input_ids: Int64[Tensor, " time"], shift_labels: Int64[Tensor, " time"]
    ) -> tuple[Float[Tensor, " predicted"], Bool[Tensor, " predicted"], Usage]:
        """Return each label's negative log-likelihood in nats, and True where it is the most likely token."""
        nats, hits, usages = [], [], []
        watch = Stopwatch(self.model.device)
        for start, logits, usage in self._read(input_ids, self._new_cache(), watch, shift_labels):
            usages.append(usage)
            labels = shift_labels[start : usage.tokens].to(logits.device)
            predicted = labels != IGNORED
            if bool(predicted.any()):
                chosen = logits[predicted].float()
                nats.append(F.cross_entropy(chosen, labels[predicted], reduction="none").cpu())
                hits.append((chosen.argmax(-1) == labels[predicted]).cpu())
        return torch.cat(nats), torch.cat(hits), usages[-1]

    def _read(
        self, ids: Tensor, cache: DynamicCache, watch: "Stopwatch", labels: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor, Usage]]:
        """Yield each chunk's start, its logits (only the last unless labels need more) and the usage so far."""
        sizes = []  # tokens read, bytes of the cache
        chunk_size = min(self.chunk_size, (len(ids) + 1) // 2)  # two chunks at least, to see the cache grow
        for start in range(0, len(ids), chunk_size):
            chunk = ids[start : start + chunk_size]
            needed = labels is not None and bool((labels[start : start + chunk_size] != IGNORED).any())
            logits = self._forward(chunk, cache, keep=0 if needed else 1)
            sizes.append((start + len(chunk), _kept_bytes(cache)))
            yield start, logits, Usage(sizes[-1][0], watch.seconds(), sizes[-1][1], _growth(sizes))

    def _forward(self, ids: Tensor, cache: DynamicCache, keep: int) -> Tensor:
        ids = ids[None].to(self.model.device)
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config())


class Stopwatch:
    """Clock that waits for the device before it reads the seconds since its start."""

    def __init__(self, device: torch.device):
        self.device, self.started = device, time.perf_counter()

    def seconds(self) -> float:
        """Wait for the device; return the seconds so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.started


def _kept_bytes(cache: DynamicCache) -> int:
    """Return the bytes of a cache's tensors.

    Raises:
        ValueError: the model does not use the cache, so it cannot read in chunks.
    """
    kept = state_bytes(cache)
    if not kept:
        raise ValueError("model keeps no state in a DynamicCache of transformers, so it cannot read in chunks")
    return kept


def _growth(sizes: list[tuple[int, int]]) -> float:
    tokens, size = sizes[-1]
    earlier, smaller = sizes[(len(sizes) - 1) // 2]
    return (size - smaller) / (tokens - earlier) if tokens > earlier else size / tokens
