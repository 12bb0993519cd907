"""Dynamic sampling: groups without signal are replaced by groups of other prompts."""

import torch

from hybridmem.distributed import all_gather_object, dealt, rank_and_size
from hybridmem.rl.objectives.advantages import groups_with_signal
from hybridmem.rl.rollouts.completions import Completions, concatenate
from hybridmem.rl.rollouts.experience import Rollout


class GroupBuffer:
    """Keeps groups whose rewards differ until they fill a batch; all ranks share it.

    Args:
        num_generations: responses of a group.
        pad_id: the token of padding.
    """

    def __init__(self, num_generations: int, pad_id: int):
        self.num_generations, self.pad_id = num_generations, pad_id
        self.waiting: list[Rollout] = []  # of all ranks, a group each

    @property
    def num_waiting(self) -> int:
        """Responses that wait for a full batch."""
        return len(self.waiting) * self.num_generations

    def fill(self, rollout: Rollout) -> Rollout | None:
        """Return this rank's share of a full batch of groups with signal, or None if there are too few yet.

        A rank whose own groups have no signal learns from groups that others have found.
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
        return Rollout(prompts, completions, torch.cat([group.rewards for group in mine]))

    def _groups(self, rollout: Rollout) -> list[Rollout | None]:
        """Return every group on its own and on the CPU, with None for those without signal."""
        signal = groups_with_signal(rollout.rewards, self.num_generations)
        parts = zip(*(x.cpu().split(self.num_generations) for x in rollout.completions), strict=True)
        rewards = rollout.rewards.split(self.num_generations)
        return [
            Rollout([prompt], Completions(*completions), earned) if kept else None
            for prompt, completions, earned, kept in zip(rollout.prompts, parts, rewards, signal.tolist(), strict=True)
        ]
