"""Accuracy of k samples: pass@k and maj@k."""

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
    """Estimate, without bias, the probability that one of k samples is right (Chen et al., arXiv 2107.03374).

    With c right samples among n ≥ k, the estimate is 1 − C(n − c, k) / C(n, k) = 1 − Π_{j<k} (n − c − j) / (n − j), the
    share of subsets of size k with a right sample. It is computed in float64.

    Raises:
        ValueError: k is below 1, or there are fewer samples than k.
    """
    samples = _check_samples(right.shape[1], k)
    wrong = samples - right.sum(1, keepdim=True)
    drawn = torch.arange(k, device=right.device)
    return 1 - ((wrong - drawn).double() / (samples - drawn)).prod(1)  # one factor is 0 if fewer than k are wrong


def maj_at_k(votes: Votes, answers: Sequence[Hashable], k: int) -> Float[Tensor, " prompts"]:
    """Compute the accuracy of majority votes of k answers for each prompt, in float64.

    If the right answer ties with others for the most votes, with m answers in total, the prompt counts 1/m, as if one
    of them was drawn. None is an unreadable answer, which has no vote; a prompt without votes counts as wrong. More
    than k samples are split into consecutive groups of k, over which the result is averaged; an incomplete group is
    ignored.

    Args:
        votes: the answers of each prompt's samples.
        answers: the right answer to each prompt.
        k: number of samples that vote together.

    Raises:
        ValueError: k is below 1, or there are fewer samples than k.
    """
    shares = []
    for sampled, answer in zip(votes, answers, strict=True):
        groups = _check_samples(len(sampled), k) // k
        won = [_share_of_first_place(sampled[n * k : (n + 1) * k], answer) for n in range(groups)]
        shares.append(sum(won) / groups)
    return torch.tensor(shares, dtype=torch.float64)


class _OfK(RunningMean):
    """Mean over prompts of a metric of k samples."""

    def __init__(self, k: int, **kwargs: Any):
        super().__init__(**kwargs)
        at_least(1, k=k)
        self.k = k


class PassAtK(_OfK):
    """Mean of `pass_at_k` over prompts.

    Args:
        k: number of samples of which one must be right.

    Raises:
        ValueError: k is below 1; in `update`, there are fewer samples than k.
    """

    def update(self, right: Bool[Tensor, "prompts samples"]) -> None:
        """Add prompts with the correctness of each sample."""
        self.add(pass_at_k(right, self.k))


class MajAtK(_OfK):
    """Mean of `maj_at_k` over prompts.

    Args:
        k: number of samples that vote together.

    Raises:
        ValueError: k is below 1; in `update`, there are fewer samples than k.
    """

    def update(self, votes: Votes, answers: Sequence[Hashable]) -> None:
        """Add prompts with the answer of each sample, None if unreadable, and the right answer."""
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
