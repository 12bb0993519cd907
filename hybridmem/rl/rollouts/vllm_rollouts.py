"""Rollouts on a server: vLLM samples, the trainer's own passes score.

The server speaks vLLM's completions API, as `trl vllm-serve` and `vllm serve` do: prompts and responses are token ids.
What it says about log-probabilities is only compared with the trainer's, which alone enter a loss.
"""

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
from .policy import Policy
from .prompts import PromptBatch
from .sampling import Sampling


@dataclass
class ServedRollouts:
    """Samples the training responses of a PolicyModule on a vLLM server.

    It serves causal LMs of transformers, on text, one response to a prompt: no HybridMem model, no images, no
    environments, no exploration of attention. Validation and refinements are sampled by the trainer itself.

    Args:
        url: of the server, without a path.
        model: the name under which it serves the policy's base model.
        sync: how it gets the trained weights. `lora`: PolicyModule's adapters are written to `folder` and loaded by
            name (the server needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1). `trl`: all weights travel
            through TRL's VLLMClient (needs a GPU, vllm and TRL, and a server that takes them, see `trl vllm-serve`).
        folder: where adapters are written, by a path that is the same for the server.
        timeout: seconds that a request may take.
        retries: tries after the first one.
        concurrency: requests at a time, one for each prompt.

    Raises:
        ValueError: settings that cannot work.
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
            raise ValueError("rollouts: sync=lora writes adapters: set folder to a path that the server can read")
        if urlsplit(self.url).path.strip("/"):
            raise ValueError(f"rollouts: url={self.url!r} must have no path, such as http://localhost:8000")
        self.url = self.url.rstrip("/")
        self._serving = self.model  # the name that responses are asked from: each version of adapters has its own
        self._client: Any = None

    def check(self, policy: Policy, unsupported: Sequence[str]) -> None:
        """Raise a ValueError if a server cannot sample for the policy.

        Args:
            policy: the policy.
            unsupported: features of the run that only the trainer's own sampling has.
        """
        model = policy.model.get_base_model() if policy.adapted else policy.model
        if isinstance(model, HybridMemForCausalLM):
            raise ValueError("rollouts: vLLM serves no HybridMem model: remove rollouts, the trainer samples by itself")
        if (self.sync == "lora") != policy.adapted:
            given = "set" if policy.adapted else None
            raise ValueError(f"rollouts: sync={self.sync} does not go with lora={given}: set both, or sync: trl")
        if policy.sharded:
            raise ValueError("rollouts: a sharded policy's weights are not gathered for a server: use strategy ddp")
        for name in unsupported:
            raise ValueError(f"rollouts: a server knows nothing of {name}: remove it, or rollouts")

    def update(self, policy: Policy) -> None:
        """Give the server the policy's weights; the first rank does, the others wait."""
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
            ValueError: prompts with images.
            EndpointError: the server is away, or answers something else.
        """
        if prompts.images is not None:
            raise ValueError("rollouts: prompts with images are not sent to a server: remove rollouts")
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
        """Answer each prompt `times` times, with its own seed.

        Raises:
            EndpointError: the server is away, or answers something else.
        """
        settings = {
            "model": self._serving, "n": times, "logprobs": 0,
            "max_tokens": sampling.max_completion_length, "temperature": sampling.temperature,
            "top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p, "stop_token_ids": list(ends),
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        bodies = [{**settings, "prompt": list(p), "seed": s} for p, s in zip(prompts, seeds, strict=True)]
        with ThreadPoolExecutor(min(self.concurrency, len(bodies))) as pool:
            answers = list(pool.map(self._endpoint("/v1/completions").post, bodies))
        return _completions([choice for answer in answers for choice in self._choices(answer, times)], ends, pad_id)

    def _choices(self, answer: Any, times: int) -> list[tuple[list[int], list[float], bool]]:
        """Tokens, log-probabilities and whether it was cut off, of each response to a prompt."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [
                (list(c["token_ids"]), list(c["logprobs"]["token_logprobs"]), c["finish_reason"] == "length")
                for c in choices
            ]
            whole = len(found) == times and all(ids and len(ids) == len(logps) for ids, logps, _ in found)
        except (KeyError, TypeError) as error:
            raise EndpointError(
                f"{self.url}: no token_ids and token_logprobs in the answer ({error!r}): it must be a vLLM server that "
                "knows return_token_ids"
            ) from error
        if not whole:
            raise EndpointError(f"{self.url}: {len(found)} responses instead of {times}, or one without a token")
        return found

    def _load_adapters(self, policy: Policy, before: str) -> None:
        """Write the adapters, let the server take them under their name, and clear the last ones away."""
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
    """Responses as the trainer's own."""
    for ids, _, cut in responses:
        if not cut and ids[-1] not in ends:
            raise EndpointError(f"a response stopped at token {ids[-1]}, which is none of stop_token_ids {list(ends)}")
    longest = max(len(ids) for ids, _, _ in responses)
    rest = [longest - len(ids) for ids, _, _ in responses]
    return Completions(
        torch.tensor([[*ids, *[pad_id] * n] for (ids, _, _), n in zip(responses, rest, strict=True)]),
        torch.tensor([[True] * (longest - n) + [False] * n for n in rest]),
        torch.tensor([cut for _, _, cut in responses]),
        torch.tensor([[*logps, *[0.0] * n] for (_, logps, _), n in zip(responses, rest, strict=True)]),
    )
