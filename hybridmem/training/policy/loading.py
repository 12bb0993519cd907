"""The policy and the reward functions of a run, from its settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybridmem.convert import Allocation
from hybridmem.distributed import shard
from hybridmem.rl.environments.tools import tools_of
from hybridmem.rl.objectives.objective import Objective
from hybridmem.rl.rollouts.agent_rollouts import Environments, begin, environment_reward
from hybridmem.rl.rollouts.policy import Example, Policy, disable_dropout, lower_precision, with_adapters
from hybridmem.training.checkpoints.contents import load_policy, tokenizer_of_policy
from hybridmem.training.checkpoints.loading import load_checkpoint
from hybridmem.training.errors import named

from .checks import check_acting, check_adapters, check_frozen

STARTING_BUFFERS = ("price",)  # of an allocation, as opposed to counters


def prepare_policy(
    name: str,
    data: Any,
    objectives: dict[str, Objective],
    frozen: bool,
    lora: dict[str, Any] | None,
    dtype: str | None,
    attn_implementation: str,
    device_mesh: Any,
) -> Policy:
    """Load the policy and the objectives' frozen models; freeze, convert, adapt and shard them.

    Raises:
        ValueError: The model cannot be loaded, or an objective cannot use it.
    """

    def load(name: str) -> tuple[Any, PreTrainedTokenizerBase | None]:
        model = load_policy(name)
        model.set_attn_implementation(attn_implementation)
        return model, tokenizer_of_policy(name)

    with named("model"):
        model = load_policy(name)
    model.set_attn_implementation(attn_implementation)
    policy = Policy(model, data, adapted=lora is not None, sharded=device_mesh is not None)
    for objective in objectives.values():
        objective.prepare(policy, load)
        if objective.init_from is not None:
            _start_from(policy.learned[objective.family], objective.init_from, objective.family)
    frozen = frozen or not any(objective.trains_model for objective in objectives.values())
    model.requires_grad_(not frozen)
    if dtype is not None:
        check_frozen(dtype, frozen or lora is not None)
        lower_precision(model, dtype)
    if lora is not None:
        check_adapters(frozen)
        policy.model = with_adapters(model, lora)
    if disable_dropout(policy.model):
        rank_zero_info("dropout is off, so that responses are scored by the policy that sampled them")
    if device_mesh is not None:
        for whole in (policy.model, *policy.frozen.values()):
            shard(whole, device_mesh)
    return policy


def _start_from(module: torch.nn.Module, path: str, family: str) -> None:
    """Load an objective's own parameters from the checkpoint of another run, or from the file of an allocation."""
    with named("init_from"):
        in_file = Path(path).suffix == ".json"
        given = _logits_of_file(module, path) if in_file else _parameters_of_checkpoint(path, family)
        wanted = dict(module.named_parameters())
        for name, parameter in wanted.items():
            here, there = list(parameter.shape), list(given[name].shape) if name in given else "absent"
            if here != there:
                raise ValueError(f"{path} was trained with other units: {name} is {there}, here {here}")
        start = {name: value for name, value in given.items() if name in (*wanted, *STARTING_BUFFERS)}
        module.load_state_dict(start, strict=False)  # counters restart


def _parameters_of_checkpoint(path: str, family: str) -> dict[str, Tensor]:
    weights = load_checkpoint(path)["state_dict"]
    prefix = f"learned.{family}."
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not own:
        raise ValueError(f"{path} holds no parameters of {family}: name a checkpoint of a run that learned them")
    return own


def _logits_of_file(module: torch.nn.Module, path: str) -> dict[str, Tensor]:
    """Return the initial logits of the units that a file opens, with the opposite sign for those that it closes."""
    opened = torch.tensor([[source == "full" for source in row] for row in Allocation.load(path).head_sources])
    logits = dict(module.named_parameters()).get("logits")
    if logits is None:
        raise ValueError(f"{path} names open heads, and unit=token opens none: name a checkpoint of a router")
    size = logits.detach().abs().mean()
    return {"logits": torch.where(opened, size, -size)}


def reward_functions(
    given: list[Callable] | None,
    data: Any,
    environments: Environments | None,
    objectives: dict[str, Objective],
    example: Example,
) -> list[Callable]:
    """Return the environment's reward and the given functions, or else the task's own reward.

    Raises:
        ValueError: An objective or an environment does not support this run.
    """
    if environments is None:
        return given or [data.task.reward]
    check_acting(objectives)
    environment = environments.factory()
    tools_of(environment)
    begin(data, example, [environment, environments.factory()])
    own = [environment_reward] if hasattr(environment, "get_reward") else []
    return [*own, *(given or [])] or [data.task.reward]
