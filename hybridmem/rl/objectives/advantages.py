"""Group-relative advantages."""

from jaxtyping import Bool, Float
from torch import Tensor

SCALES = ("group", "batch", "none")
STD_EPS = 1e-4  # as in TRL


def group_advantages(
    rewards: Float[Tensor, " responses"], num_generations: int, scale_rewards: str = "group"
) -> Float[Tensor, " responses"]:
    """Return A = (R − mean of the group) / (std + 1e-4), exactly 0 in groups whose rewards are all equal.

    The standard deviation (of n − 1) is the group's, the batch's or none.

    Args:
        rewards: of the generation batch of all processes, groups next to one another.
        num_generations: responses of a group.
        scale_rewards: `group`, `batch` or `none`, which divides by nothing.

    Raises:
        ValueError: a group of one, rewards that are not whole groups, or an unknown scale.
    """
    check_choice("scale_rewards", scale_rewards, SCALES)
    groups = grouped(rewards, num_generations)
    # A rounded mean differs from equal rewards by an ulp, which an optimiser like Adam turns into full-sized steps.
    signal = groups_with_signal(rewards, num_generations)[:, None]
    advantages = (groups - groups.mean(1, keepdim=True)).masked_fill(~signal, 0)
    if scale_rewards == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + STD_EPS)
    elif scale_rewards == "batch":
        advantages = advantages / (rewards.std() + STD_EPS)
    return advantages.flatten()


def groups_with_signal(rewards: Float[Tensor, " responses"], num_generations: int) -> Bool[Tensor, " groups"]:
    """Return which groups have rewards that differ; all advantages of the others are 0.

    Raises:
        ValueError: a group of one, or rewards that are not whole groups.
    """
    groups = grouped(rewards, num_generations)
    return groups.amax(1) > groups.amin(1)


def grouped(rewards: Float[Tensor, " responses"], num_generations: int) -> Float[Tensor, "groups num_generations"]:
    """Return rewards as groups.

    Raises:
        ValueError: a group of one, or rewards that are not whole groups.
    """
    if num_generations < 2:
        raise ValueError(
            f"num_generations={num_generations}: a group of one has no advantage over itself; sample 2 or more"
        )
    if len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of num_generations={num_generations}")
    return rewards.reshape(-1, num_generations)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError if a setting is not one of its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
