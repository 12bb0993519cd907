"""What k samples are good for: one of them right, or most of them."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hybridmem.checks import at_least

from .mean import RunningMean

Votes = Sequence[Sequence[Hashable | None]]


def pass_at_k(right: Bool[Tensor, "prompts samples"], k: int) -> Float[Tensor, " prompts"]:
    """The chance that one of k samples is right, unbiased from n ≥ k samples of which c are (Chen et al., 2107.03374).

    1 − C(n − c, k) / C(n, k) = 1 − Π_{j<k} (n − c − j) / (n − j), in float64: the share of the subsets of k with a
    right one among them.

    Raises:
        ValueError: k below 1, or fewer samples than k.
    """
    samples = _check_samples(right.shape[1], k)
    wrong = samples - right.sum(1, keepdim=True)
    drawn = torch.arange(k, device=right.device)
    return 1 - ((wrong - drawn).double() / (samples - drawn)).prod(1)  # one factor is 0 where fewer than k are wrong


def maj_at_k(votes: Votes, answers: Sequence[Hashable], k: int) -> Float[Tensor, " prompts"]:
    """Whether the commonest of k answers is the right one, for each prompt, in float64.

    Answers that tie for the first place share the vote: of m of them with the right one among them, 1/m counts, as
    if one was drawn. None is an answer that cannot be read: it has no vote, and with no other it is wrong. With more
    than k samples this is the mean over the groups of k that follow one another; what fills no group is left out.

    Args:
        votes: the answers of each prompt's samples.
        answers: the right answer to each prompt.
        k: samples that vote together.

    Raises:
        ValueError: k below 1, or fewer samples than k.
    """
    shares = []
    for sampled, answer in zip(votes, answers, strict=True):
        groups = _check_samples(len(sampled), k) // k
        won = [_share_of_first_place(sampled[n * k : (n + 1) * k], answer) for n in range(groups)]
        shares.append(sum(won) / groups)
    return torch.tensor(shares, dtype=torch.float64)


class _OfK(RunningMean):
    """A mean over prompts of what k samples are good for."""

    def __init__(self, k: int, **kwargs: Any):
        super().__init__(**kwargs)
        at_least(1, k=k)
        self.k = k


class PassAtK(_OfK):
    """`pass_at_k`, averaged over prompts.

    Args:
        k: samples of which one must be right.

    Raises:
        ValueError: k below 1; in `update`, fewer samples than k.
    """

    def update(self, right: Bool[Tensor, "prompts samples"]) -> None:
        """Add prompts: which of each one's samples are right."""
        self.add(pass_at_k(right, self.k))


class MajAtK(_OfK):
    """`maj_at_k`, averaged over prompts.

    Args:
        k: samples that vote together.

    Raises:
        ValueError: k below 1; in `update`, fewer samples than k.
    """

    def update(self, votes: Votes, answers: Sequence[Hashable]) -> None:
        """Add prompts: what each one's samples answer, None where that cannot be read, and the right answer."""
        self.add(maj_at_k(votes, answers, self.k))


def _check_samples(samples: int, k: int) -> int:
    at_least(1, k=k)
    if samples < k:
        raise ValueError(f"k={k} needs {k} samples of every prompt, not {samples}: sample more, or lower k")
    return samples


def _share_of_first_place(votes: Sequence[Hashable | None], answer: Hashable) -> float:
    counts = Counter(vote for vote in votes if vote is not None)
    first = [vote for vote, count in counts.items() if count == max(counts.values())]
    return 1 / len(first) if answer in first else 0.0
