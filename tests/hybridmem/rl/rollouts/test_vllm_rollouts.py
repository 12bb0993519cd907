"""Rollouts on a server, which is the policy's own model with vLLM's interface."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from hybridmem.rl.rewards.http import EndpointError
from hybridmem.rl.rollouts.non_finite import NonFiniteLogits
from hybridmem.rl.rollouts.prompts import pad_prompts
from hybridmem.rl.rollouts.sampling import Sampling, sample
from hybridmem.training import ServedRollouts
from tests.hybridmem.rl.servers import as_json, serving
from tests.hybridmem.training.policy.test_module import ATTENTION, TOKENS, write_config
from tests.hybridmem.training.runs import hybridmem, logged

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
LORA = {"r": 2, "target_modules": "all-linear"}
SAMPLING = Sampling(max_completion_length=3)


class Server:
    """Fake vLLM server with its loaded adapters."""

    def __init__(self, base: Path):
        self.base, self.adapters = base, {}

    def __call__(self, body, number):
        if "lora_path" in body:
            self.adapters[body["lora_name"]] = body["lora_path"]
            return 200, b"Success"
        if "lora_name" in body:
            del self.adapters[body["lora_name"]]
            return 200, b"Success"
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(self.base), self.adapters[body["model"]])
        prompts = pad_prompts([body["prompt"]], 0, torch.device("cpu"))
        sampling = Sampling(max_completion_length=body["max_tokens"], temperature=body["temperature"])
        generator = torch.Generator().manual_seed(body["seed"])
        found = sample(model.eval(), prompts, body["n"], sampling, body["stop_token_ids"], 0, generator)
        return as_json({"choices": [self.choice(row, found) for row in reversed(range(body["n"]))]})

    def choice(self, row, found):
        """Format a response like vLLM."""
        mask, cut = found.mask[row], bool(found.truncated[row])
        logps = {"token_logprobs": found.sampled_logps[row][mask].tolist()}
        reason = "length" if cut else "stop"
        return {"index": row, "token_ids": found.ids[row][mask].tolist(), "logprobs": logps, "finish_reason": reason}


def test_a_policy_learns_from_a_servers_samples(tmp_path, monkeypatch):
    server = Server(tmp_path / "policy")
    with serving(server) as (url, requests):
        rollouts = {"url": url, "model": "base", "folder": str(tmp_path / "adapters")}
        config = write_config(tmp_path, "llama", model__init_args__lora=LORA, model__init_args__rollouts=rollouts)
        hybridmem(monkeypatch, "fit", "--config", config)
    # The server had each step's weights, so the trainer computes the same log-probabilities.
    assert max(logged(tmp_path, "sampling/sampling_logp_difference/max")) < 1e-4
    assert len(logged(tmp_path, "reward")) == 3
    assert len(server.adapters) == len(list((tmp_path / "adapters").iterdir())) == 1
    asked = [request["body"] for request in requests if "prompt" in request["body"]]
    assert len(asked) == len({body["seed"] for body in asked}) == 6  # two prompts per rollout, all with different seeds


@pytest.mark.parametrize(
    ("model", "changes", "rollouts", "message"),
    [
        ("ours", {"lora": LORA}, {}, "vLLM cannot serve HybridMem models"),
        ("llama", {}, {}, "sync=lora cannot be combined with lora=None"),
        (
            "llama",
            {"lora": LORA, "objectives": [TOKENS, {**ATTENTION, "init_args": {"exploration": 0.5}}]},
            {},
            "a server does not support AttentionRL's exploration",
        ),
        ("llama", {"lora": LORA}, {"folder": None}, "set folder to a path that the server reads"),
        ("llama", {"lora": LORA}, {"url": "http://127.0.0.1:1/v1"}, "contains a path"),
        ("llama", {"lora": LORA}, {"sync": "disk"}, "sync"),
    ],
)
def test_unsupported_runs_on_a_server_raise(tmp_path, monkeypatch, capsys, model, changes, rollouts, message):
    settings = {"url": "http://127.0.0.1:1", "model": "base", "folder": str(tmp_path), **rollouts}
    settings = {name: value for name, value in settings.items() if value is not None}
    arguments = {f"model__init_args__{name}": value for name, value in changes.items()}
    config = write_config(tmp_path, model, model__init_args__rollouts=settings, **arguments)
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", config)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("logp", [None, float("nan"), float("-inf")])
def test_non_finite_log_probabilities_are_named(logp):
    logps = {"token_logprobs": [-1.0, logp]}
    choices = [{"index": 0, "token_ids": [5, 6], "logprobs": logps, "finish_reason": "length"}]
    with serving(lambda *_: as_json({"choices": choices})) as (url, _):
        served = ServedRollouts(url, "base", folder="x", retries=0)
        with pytest.raises(NonFiniteLogits, match=f"from the server {url} are non-finite"):
            served.sample([[1, 2]], 1, SAMPLING, [7], 0, [0])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([{"index": 0, "text": "a"}], "use a version of vLLM that supports return_token_ids"),
        (
            [{"index": 0, "token_ids": [], "logprobs": {"token_logprobs": []}, "finish_reason": "stop"}],
            "or an empty response",
        ),
        (
            [{"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}] * 2,
            "2 resp",
        ),
        (
            [{"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}],
            "at token 5",
        ),
    ],
)
def test_answers_that_cannot_be_used_are_named(choices, message):
    with serving(lambda *_: as_json({"choices": choices})) as (url, _):
        served = ServedRollouts(url, "base", folder="x", retries=0)
        with pytest.raises(EndpointError, match=message):
            served.sample([[1, 2]], 1, SAMPLING, [7], 0, [0])
