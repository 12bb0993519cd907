"""A policy that acts in environments, over many turns, and what came of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Int
from torch import Tensor

from hybridmem.data.vision import Prompt
from hybridmem.rl.environments.tools import act
from hybridmem.rl.rollouts.multi_turn import Reply, sample_turns
from hybridmem.rl.rollouts.sampling import Completions, Generators, Sampling, evaluating

if TYPE_CHECKING:
    from .module import PolicyModule


@dataclass
class Acted:
    """Trajectories, those from one example side by side, and the environments as they left them."""

    prompts: list[Prompt]  # of each example
    completions: Completions
    environments: list[Any]
    turns: Int[Tensor, " responses"]
    faulty: Bool[Tensor, "responses length"]
    calls: int
    failures: int

    def metrics(self) -> dict[str, tuple[float, int]]:
        """Turns and calls of a trajectory, the share of calls that failed, under TRL's names; each with its weight."""
        count = len(self.environments)
        return {
            "turns/mean": (self.turns.float().mean().item(), count),
            "tools/call_frequency": (self.calls / count, count),
            "tools/failure_frequency": (self.failures / max(self.calls, 1), self.calls),
        }


def act_out(
    module: "PolicyModule",
    examples: list[dict[str, Any]],
    times: int,
    sampling: Sampling,
    generator: Generators = None,
) -> Acted:
    """Act `times` times on every example, each time in an environment of its own."""
    assert module.environment_factory is not None
    environments = [module.environment_factory() for _ in range(len(examples) * times)]
    prompts = [begin(module, example, environments[n * times : (n + 1) * times]) for n, example in enumerate(examples)]
    counted = {"calls": 0, "failures": 0}

    def respond(number: int, tokens: list[int]) -> Reply:
        turn = module.data.tokenizer.decode(tokens)
        step = act(environments[number], turn, module.call_format, module.max_observation_length)
        counted["calls"] += step.calls
        counted["failures"] += step.failures
        observation = [] if step.ended else module.data.observation_tokens(step.observation)
        return Reply(observation, failed=step.failures > 0, ended=step.ended)

    with evaluating(module.model):
        completions, turns, faulty = sample_turns(
            module.model, module.prompt_batch(prompts), times, sampling, module.max_turns, respond,
            module.eos_token_ids, module.data.pad_id, generator,
        )  # fmt: skip
    return Acted(prompts, completions, environments, turns, faulty, **counted)


def environment_reward(environments: list[Any], **columns: Any) -> list[float]:
    """What every environment says was earned in it."""
    return [environment.get_reward() for environment in environments]


def begin(module: "PolicyModule", example: dict[str, Any], environments: list[Any]) -> Prompt:
    """The prompt of an example, behind it what its environments begin with.

    Raises:
        ValueError: they begin with different texts: a group shares its prompt.
    """
    columns = {name: value for name, value in example.items() if name != "prompt"}
    texts = {environment.reset(**columns) or "" for environment in environments}
    if len(texts) > 1:
        raise ValueError(
            f"environment_factory: the environments of one example begin with {len(texts)} different texts, but a "
            "group answers one prompt: let reset() follow from the example's columns alone"
        )
    return module.data.prompt({**example, "prompt": example["prompt"] + texts.pop()})
