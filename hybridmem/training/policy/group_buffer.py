"""Groups with different rewards: a buffer for dynamic sampling, and a watch for runs that find none."""

from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from hybridmem.distributed import all_gather_object, dealt, rank_and_size
from hybridmem.rl.objectives.advantages import groups_with_signal
from hybridmem.rl.rollouts.completions import Completions, concatenate
from hybridmem.rl.rollouts.experience import Rollout
from hybridmem.rl.rollouts.prompts import Prompt
from hybridmem.training.errors import StoppedError

ENDLESS = 10  # multiple of max_empty_rollouts after which dynamic sampling would never end


class GroupBuffer:
    """Buffer of groups whose rewards differ, filled until they make a batch, and shared by all ranks.

    Args:
        num_generations: number of responses in a group.
        pad_id: ID of the padding token.
    """

    def __init__(self, num_generations: int, pad_id: int):
        self.num_generations, self.pad_id = num_generations, pad_id
        self.waiting: list[Rollout] = []  # one group each, from all ranks

    @property
    def num_waiting(self) -> int:
        """Number of responses that wait for a full batch."""
        return len(self.waiting) * self.num_generations

    def fill(self, rollout: Rollout) -> Rollout | None:
        """Return this rank's share of a full batch of groups with signal, or None if there are still too few.

        A rank without such groups learns from groups of other ranks.
        """
        rank, size = rank_and_size()
        self.waiting += [group for group in dealt(all_gather_object(self._groups(rollout))) if group is not None]
        wanted = len(rollout.prompts) * size
        if len(self.waiting) < wanted:
            return None
        chosen, self.waiting = self.waiting[:wanted], []
        mine = chosen[rank::size]
        completions = concatenate([group.completions for group in mine], self.pad_id)
        prompts = [prompt for group in mine for prompt in group.prompts]
        kept = [group.completions.mask if group.kept is None else group.kept for group in mine]
        length = completions.ids.shape[1]
        return Rollout(
            prompts,
            completions,
            torch.cat([group.rewards for group in mine]),
            kept=torch.cat([torch.nn.functional.pad(mask, (0, length - mask.shape[1])) for mask in kept]),
        )

    def _groups(self, rollout: Rollout) -> list[Rollout | None]:
        """Split a rollout into groups on the CPU, with None for groups without signal."""
        signal = groups_with_signal(rollout.rewards, self.num_generations)
        parts = zip(*(x.cpu().split(self.num_generations) for x in rollout.completions), strict=True)
        rewards = rollout.rewards.split(self.num_generations)
        mask = rollout.completions.mask if rollout.kept is None else rollout.kept
        kept = mask.cpu().split(self.num_generations)
        groups = zip(rollout.prompts, parts, rewards, kept, signal.tolist(), strict=True)
        return [
            Rollout([prompt], Completions(*completions), earned, kept=tokens) if found else None
            for prompt, completions, earned, tokens, found in groups
        ]

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the waiting groups as plain values, which load without executing code."""
        return [
            {
                "prompt": tuple(group.prompts[0]),
                "completions": tuple(group.completions),
                "rewards": group.rewards,
                "kept": group.kept,
            }
            for group in self.waiting
        ]

    def load_state_dict(self, groups: list[dict[str, Any]]) -> None:
        """Restore the waiting groups of a checkpoint.

        Raises:
            ValueError: the groups have another size.
        """
        for group in groups:
            if len(group["rewards"]) != self.num_generations:
                raise ValueError(
                    f"num_generations={self.num_generations}, but the checkpoint holds waiting groups of "
                    f"{len(group['rewards'])} responses; resume with num_generations={len(group['rewards'])}"
                )
        self.waiting = [
            Rollout(
                [Prompt(*group["prompt"])], Completions(*group["completions"]), group["rewards"], kept=group["kept"]
            )
            for group in groups
        ]


class SignalWatch:
    """Watch that warns of rollouts without any signal, and ends dynamic sampling that never finds one.

    Args:
        max_empty_rollouts: consecutive rollouts without signal before a warning; ten times this number ends dynamic
            sampling.
        num_generations: number of responses in a group.
        rewards: names of the reward functions.
        endless: True if the run waits for groups with signal (dynamic sampling).
    """

    def __init__(self, max_empty_rollouts: int, num_generations: int, rewards: list[str], endless: bool):
        self.max_empty_rollouts, self.num_generations = max_empty_rollouts, num_generations
        self.rewards, self.endless = rewards, endless
        self.num_empty = 0  # consecutive rollouts without signal, across restarts

    def look(self, rewards: Float[Tensor, " responses"]) -> None:
        """Check the rewards of all ranks for a signal.

        Raises:
            StoppedError: dynamic sampling found no signal in ten times max_empty_rollouts rollouts.
        """
        if groups_with_signal(rewards, self.num_generations).any():
            self.num_empty = 0
            return
        self.num_empty += 1
        if self.endless and self.num_empty >= ENDLESS * self.max_empty_rollouts:
            raise StoppedError(f"{self._found(rewards)}; {self._remedy()}")
        if self.num_empty == self.max_empty_rollouts:
            rank_zero_warn(f"{self._found(rewards)}, so no response has an advantage; {self._remedy()}")

    def _found(self, rewards: Float[Tensor, " responses"]) -> str:
        values = rewards.unique().tolist()
        shown = ", ".join(f"{value:.4g}" for value in values[:3]) + (", …" if len(values) > 3 else "")
        return (
            f"in {self.num_empty} consecutive rollouts, {' + '.join(self.rewards)} gave all responses of each group "
            f"the same reward ({shown})"
        )

    def _remedy(self) -> str:
        return "check the reward function, use easier or harder prompts, or raise num_generations or max_empty_rollouts"
