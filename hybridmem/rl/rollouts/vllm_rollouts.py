"""Rollouts on a vLLM server; the trainer scores the responses itself.

The server must offer vLLM's completions API, as `trl vllm-serve` and `vllm serve` do. Prompts and responses are token
ids. Losses use the trainer's log-probabilities; the server's only serve to measure the difference.
"""

import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch

from hybridmem.checks import at_least, one_of
from hybridmem.distributed import all_gather_object, rank_and_size
from hybridmem.model.modeling import HybridMemForCausalLM
from hybridmem.rl.attention.action import Action
from hybridmem.rl.rewards.http import Endpoint, EndpointError

from .completions import Completions
from .non_finite import NonFiniteLogits
from .policy import Policy
from .prompts import PromptBatch
from .sampling import Sampling


@dataclass
class ServedRollouts:
    """Sampler of a PolicyModule's training responses on a vLLM server.

    It supports text-only, single-turn rollouts of causal LMs of transformers: no HybridMem models, images,
    environments or attention exploration. The trainer itself samples validation responses and refinements.

    Args:
        url: the server's URL without a path.
        model: the name under which the server serves the policy's base model.
        sync: how the server gets the trained weights. `lora` writes PolicyModule's adapters to `folder` and loads them
            by name (the server needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1). `trl` sends all weights
            through TRL's VLLMClient (needs a GPU, vllm, TRL and a server such as `trl vllm-serve`).
        folder: the folder for adapters; the server must see it under the same path.
        timeout: seconds before a request times out.
        retries: the number of retries of a failed request.
        concurrency: the maximum number of concurrent requests; each request holds one prompt.

    Raises:
        ValueError: The settings are invalid, or contradict each other.
    """

    url: str
    model: str
    sync: str = "lora"
    folder: str | None = None
    timeout: float = 600.0
    retries: int = 3
    concurrency: int = 64

    def __post_init__(self) -> None:
        one_of(("lora", "trl"), sync=self.sync)
        at_least(1, concurrency=self.concurrency)
        if self.sync == "lora" and self.folder is None:
            raise ValueError(
                "rollouts: sync=lora needs a folder for adapters: set folder to a path that the server reads"
            )
        if urlsplit(self.url).path.strip("/"):
            raise ValueError(f"rollouts: url={self.url!r} contains a path; use a URL such as http://localhost:8000")
        self.url = self.url.rstrip("/")
        self._serving = self.model  # the model name in requests; changes with each version of the adapters
        self._client: Any = None

    def check(self, policy: Policy, unsupported: Sequence[str]) -> None:
        """Raise a ValueError if a server cannot sample for the policy.

        Args:
            policy: the policy.
            unsupported: features of the run that only the trainer's own sampler supports.
        """
        model = policy.base_model
        if isinstance(model, HybridMemForCausalLM):
            raise ValueError("rollouts: vLLM cannot serve HybridMem models; remove rollouts to sample in the trainer")
        if (self.sync == "lora") != policy.adapted:
            given = "set" if policy.adapted else None
            raise ValueError(
                f"rollouts: sync={self.sync} cannot be combined with lora={given}: set both sync=lora and lora, or "
                "sync=trl without lora"
            )
        if policy.sharded:
            raise ValueError("rollouts: the weights of a sharded policy cannot be sent to a server; use strategy=ddp")
        for name in unsupported:
            raise ValueError(f"rollouts: a server does not support {name}; remove {name} or rollouts")

    def update(self, policy: Policy) -> None:
        """Send the policy's weights to the server from rank 0, while the other ranks wait."""
        rank, _ = rank_and_size()
        if self.sync == "lora":
            before, self._serving = self._serving, all_gather_object(f"hybridmem_{uuid4().hex}")[0]
            if rank == 0:
                self._load_adapters(policy, before)
        elif rank == 0:
            self._send_weights(policy)
        all_gather_object(None)

    def respond(
        self,
        policy: Policy,
        prompts: PromptBatch,
        num_generations: int,
        sampling: Sampling,
        generators: list[torch.Generator],
        actions: Sequence[Action] = (),
    ) -> Completions:
        """Update the server's weights and sample `num_generations` responses to each prompt.

        Raises:
            ValueError: The prompts contain images.
            EndpointError: The server cannot be reached, or its answer is malformed.
            NonFiniteLogits: The server's model has non-finite logits.
        """
        if prompts.images is not None:
            raise ValueError("rollouts: a server does not support prompts with images; remove rollouts")
        self.update(policy)
        rows, mask = prompts.input_ids, prompts.attention_mask
        tokens = rows.tolist() if mask is None else [row[kept].tolist() for row, kept in zip(rows, mask, strict=True)]
        seeds = [generator.initial_seed() & 0x7FFFFFFF for generator in generators]
        completions = self.sample(tokens, num_generations, sampling, policy.eos_token_ids, policy.data.pad_id, seeds)
        return Completions(*(x.to(policy.device) for x in completions))

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        times: int,
        sampling: Sampling,
        ends: Sequence[int],
        pad_id: int,
        seeds: Sequence[int],
    ) -> Completions:
        """Sample `times` responses to each prompt with the prompt's own seed.

        Raises:
            EndpointError: The server cannot be reached, or its answer is malformed.
            NonFiniteLogits: The server's model has non-finite logits.
        """
        settings = {
            "model": self._serving,
            "n": times,
            "logprobs": 0,
            "max_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "stop_token_ids": list(ends),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        bodies = [{**settings, "prompt": list(p), "seed": s} for p, s in zip(prompts, seeds, strict=True)]
        with ThreadPoolExecutor(min(self.concurrency, len(bodies))) as pool:
            answers = list(pool.map(self._endpoint("/v1/completions").post, bodies))
        return _completions([choice for answer in answers for choice in self._choices(answer, times)], ends, pad_id)

    def _choices(self, answer: Any, times: int) -> list[tuple[list[int], list[float], bool]]:
        """Return (tokens, log-probabilities, cut off) of each response to a prompt."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [
                (list(c["token_ids"]), list(c["logprobs"]["token_logprobs"]), c["finish_reason"] == "length")
                for c in choices
            ]
            whole = len(found) == times and all(ids and len(ids) == len(logps) for ids, logps, _ in found)
        except (KeyError, TypeError) as error:
            raise EndpointError(
                f"{self.url}: the answer lacks token_ids or token_logprobs ({error!r}); use a version of vLLM that "
                "supports return_token_ids"
            ) from error
        if not whole:
            raise EndpointError(
                f"{self.url}: the answer has {len(found)} responses instead of {times}, or an empty response"
            )
        if not all(logp is not None and math.isfinite(logp) for _, logps, _ in found for logp in logps):
            raise NonFiniteLogits(f"the log-probabilities from the server {self.url} are non-finite")
        return found

    def _load_adapters(self, policy: Policy, before: str) -> None:
        """Write the adapters, load them into the server under a new name, and delete the previous version."""
        assert self.folder is not None
        path = Path(self.folder).absolute() / self._serving
        policy.model.save_pretrained(path)
        self._endpoint("/v1/load_lora_adapter").post({"lora_name": self._serving, "lora_path": str(path)}, bytes)
        if before != self.model:
            self._endpoint("/v1/unload_lora_adapter").post({"lora_name": before}, bytes)
            shutil.rmtree(path.with_name(before))

    def _send_weights(self, policy: Policy) -> None:
        if self._client is None:
            from trl.generation.vllm_client import VLLMClient

            self._client = VLLMClient(base_url=self.url, connection_timeout=self.timeout)
            self._client.init_communicator(policy.device)
        self._client.update_model_params(policy.model)
        self._client.reset_prefix_cache()

    def _endpoint(self, path: str) -> Endpoint:
        return Endpoint(url=self.url + path, timeout=self.timeout, retries=self.retries, max_bytes=1 << 28)


def _completions(
    responses: Sequence[tuple[list[int], list[float], bool]], ends: Sequence[int], pad_id: int
) -> Completions:
    """Pad responses to Completions."""
    for ids, _, cut in responses:
        if not cut and ids[-1] not in ends:
            raise EndpointError(f"a response stopped at token {ids[-1]}, which is not in stop_token_ids={list(ends)}")
    longest = max(len(ids) for ids, _, _ in responses)
    rest = [longest - len(ids) for ids, _, _ in responses]
    return Completions(
        torch.tensor([[*ids, *[pad_id] * n] for (ids, _, _), n in zip(responses, rest, strict=True)]),
        torch.tensor([[True] * (longest - n) + [False] * n for n in rest]),
        torch.tensor([cut for _, _, cut in responses]),
        torch.tensor([[*logps, *[0.0] * n] for (_, logps, _), n in zip(responses, rest, strict=True)]),
    )
