"""Multi-turn rollouts of a policy in environments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from hybridmem.rl.attention.action import Action
from hybridmem.rl.environments.tools import act

from .completions import Completions
from .multi_turn import Reply, sample_turns
from .policy import Example, Policy
from .prompts import Prompt
from .random_streams import Generators
from .sampling import Sampling, evaluating


@dataclass(frozen=True)
class Environments:
    """Environment settings of a run.

    Args:
        factory: creates one environment per response.
        max_turns: the maximum number of turns in a trajectory.
        call_format: the format of tool calls, `plain` or `json`.
        max_observation_length: the number of characters to which observations are truncated.
    """

    factory: Callable[[], Any]
    max_turns: int
    call_format: str
    max_observation_length: int


@dataclass
class Trajectories:
    """Trajectories, grouped by example, and their environments in the final state."""

    prompts: list[Prompt]  # one per example
    completions: Completions
    environments: list[Any]
    turns: Int[Tensor, " responses"]
    faulty: Bool[Tensor, "responses length"]
    calls: int
    failures: int

    def metrics(self) -> dict[str, tuple[float, int]]:
        """Return (value, weight) of turns and calls per trajectory and of the share of failed calls, by TRL's names."""
        count = len(self.environments)
        return {
            "turns/mean": (self.turns.float().mean().item(), count),
            "tools/call_frequency": (self.calls / count, count),
            "tools/failure_frequency": (self.failures / max(self.calls, 1), self.calls),
        }


def act_out(
    policy: Policy,
    environments: Environments,
    examples: list[Example],
    num_generations: int,
    sampling: Sampling,
    generator: Generators = None,
    actions: Sequence[Action] = (),
) -> Trajectories:
    """Roll out `num_generations` trajectories per example, each in a new environment.

    Args:
        policy: the policy that acts.
        environments: the environments of the run.
        examples: one example per group.
        num_generations: the number of trajectories per example.
        sampling: the sampling settings.
        generator: a random generator, or one per example.
        actions: choices of objectives, with one row per trajectory.
    """
    worlds = [environments.factory() for _ in range(len(examples) * num_generations)]
    prompts = [
        begin(policy.data, example, worlds[n * num_generations : (n + 1) * num_generations])
        for n, example in enumerate(examples)
    ]
    counted = {"calls": 0, "failures": 0}

    def respond(number: int, tokens: list[int]) -> Reply:
        turn = policy.tokenizer.decode(tokens)
        step = act(worlds[number], turn, environments.call_format, environments.max_observation_length)
        counted["calls"] += step.calls
        counted["failures"] += step.failures
        observation = [] if step.ended else policy.data.observation_tokens(step.observation)
        return Reply(observation, failed=step.failures > 0, ended=step.ended)

    with evaluating(policy.model):
        completions, turns, faulty = sample_turns(
            policy.model,
            policy.prompt_batch(prompts),
            num_generations,
            sampling,
            environments.max_turns,
            respond,
            policy.eos_token_ids,
            policy.data.pad_id,
            generator,
            actions,
        )
    return Trajectories(prompts, completions, worlds, turns, faulty, **counted)


def environment_reward(environments: list[Any], **columns: Any) -> list[float]:
    """Return the reward of each environment."""
    return [environment.get_reward() for environment in environments]


def begin(data: Any, example: Example, environments: list[Any]) -> Prompt:
    """Reset the environments of an example; return its prompt followed by their first observation.

    Raises:
        ValueError: The environments' first observations differ, but a group must share its prompt.
    """
    columns = {name: value for name, value in example.items() if name != "prompt"}
    texts = {environment.reset(**columns) or "" for environment in environments}
    if len(texts) > 1:
        raise ValueError(
            f"environment_factory: reset() returned {len(texts)} different texts for one example, but a group shares "
            "one prompt; make reset() depend on the example's columns only"
        )
    return data.prompt({**example, "prompt": example["prompt"] + texts.pop()})
