"""Group-relative advantages."""

from jaxtyping import Bool, Float
from torch import Tensor

SCALES = ("group", "batch", "none")
STD_EPS = 1e-4  # as in TRL


def group_advantages(
    rewards: Float[Tensor, " responses"], num_generations: int, scale_rewards: str = "group"
) -> Float[Tensor, " responses"]:
    """Return A = (R − mean of the group) / (std + 1e-4), exactly 0 in groups whose rewards are all equal.

    The standard deviation has n − 1 in its denominator and covers the group or the batch, or is left out.

    Args:
        rewards: the rewards of the generation batch on all ranks, one group after the other.
        num_generations: the number of responses in each group.
        scale_rewards: `group`, `batch`, or `none` for no division.

    Raises:
        ValueError: A group has a single response, a group is incomplete, or the scale is unknown.
    """
    check_choice("scale_rewards", scale_rewards, SCALES)
    groups = grouped(rewards, num_generations)
    # The rounded mean of equal rewards may be off by one ulp, which Adam would turn into a full-sized step.
    signal = groups_with_signal(rewards, num_generations)[:, None]
    advantages = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + STD_EPS)
    elif scale_rewards == "batch":
        advantages = advantages / (rewards.std() + STD_EPS)
    return advantages.masked_fill(~signal, 0).flatten()


def groups_with_signal(rewards: Float[Tensor, " responses"], num_generations: int) -> Bool[Tensor, " groups"]:
    """Return a mask of the groups whose rewards differ; the advantages of all other groups are 0.

    Raises:
        ValueError: A group has a single response, or a group is incomplete.
    """
    groups = grouped(rewards, num_generations)
    return groups.amax(1) > groups.amin(1)


def grouped(rewards: Float[Tensor, " responses"], num_generations: int) -> Float[Tensor, "groups num_generations"]:
    """Reshape rewards to one row per group.

    Raises:
        ValueError: A group has a single response, or a group is incomplete.
    """
    if num_generations < 2:
        raise ValueError(
            f"num_generations={num_generations} gives every response an advantage of 0; sample 2 or more per prompt"
        )
    if len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} rewards cannot be split into groups of num_generations={num_generations}")
    return rewards.reshape(-1, num_generations)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError if a setting's value is not among its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
