"""Allocations, which open some units of a model beyond their window, and the policy that draws them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .action import Part, SharedAction

MAX_LOGIT = 4.0  # keeps every probability within [0.018, 0.982], so that no unit stops exploring

Logits = Float[Tensor, "layers heads"]
Share = Float[Tensor, "rows layers heads"]
ShareOfTokens = Callable[[int, Float[Tensor, "rows time hidden"]], Float[Tensor, "rows time"]]


@runtime_checkable
class Units(Protocol):
    """The units of a model that can be allocated."""

    layers: list[int]  # their numbers
    num_heads: int  # units of each layer

    @property
    def window_and_sinks(self) -> tuple[int, int]:
        """Return the tokens of a closed unit's window, and the first tokens that it sees."""
        ...

    def sources_of(self, opened: Bool[Tensor, "layers heads"]) -> list[list[str]] | None:
        """Return the source of every KV head of the model, or None if units are not KV heads."""
        ...

    def applied(self, model: Any, share: Share | None) -> AbstractContextManager[None]:
        """Return a context in which a unit reads beyond the window by its share: 1 does, 0 does not, others mix.

        Args:
            model: the model, inside PEFT or not.
            share: of each row, or of all rows if it has one; None: every unit reads beyond the window.
        """
        ...

    def routed(self, model: Any, share_of: ShareOfTokens) -> AbstractContextManager[None]:
        """Return a context in which each token of a layer reads beyond the window, in all heads, by its own share.

        Args:
            model: the model, inside PEFT or not.
            share_of: returns the share of every token, from a layer's place in `layers` and the layer's normed input.
        """
        ...

    def counted(self, read: Bool[Tensor, "rows time"]) -> Bool[Tensor, "rows time"]:
        """Mark the tokens whose own share the reading of some tokens depends on."""
        ...


class DrawnAction(ABC):
    """Action that is drawn for every response, and by which prompts are read only with `prefill: allocated`.

    Attributes:
        units: the model's units.
        prefill: `full` reads prompts with every unit open, once for all responses; `allocated` by the action.
    """

    units: Units
    prefill: str

    @property
    def prefill_once(self) -> bool:
        """Return True if prompts are read independently of the action."""
        return self.prefill == "full"

    @property
    def in_passes(self) -> bool:
        """Return True, because responses are scored under the action that sampled them."""
        return True

    def applied(self, model: Any, part: Part = "response") -> AbstractContextManager[None]:
        """Return a context in which the model reads by the action."""
        if part == "prompt" and self.prefill == "full":
            return self.units.applied(model, None)
        return self.as_drawn(model)

    @abstractmethod
    def as_drawn(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the model reads everything by the action."""


class UnitPolicy(nn.Module):
    """Policy over units: the price of reading beyond the window, and the reward of full attention.

    Args:
        num_heads: units of each layer.
        num_shared: heads of a layer whose choices differ; 1 if all heads of a layer read alike.
        num_layers: layers with units.
    """

    price: Tensor
    full_reward: Tensor
    num_rollouts: Tensor
    num_collapsed: Tensor

    def __init__(self, num_layers: int, num_heads: int, num_shared: int):
        super().__init__()
        self.num_heads, self.shape = num_heads, (num_layers, num_shared)
        self.register_buffer("price", torch.zeros((), dtype=torch.float64))  # λ
        self.register_buffer("full_reward", torch.zeros((), dtype=torch.float64))  # magnitude, summed over rollouts
        self.register_buffer("num_rollouts", torch.zeros((), dtype=torch.long))  # or steps on given answers
        self.register_buffer("num_collapsed", torch.zeros((), dtype=torch.long))  # in a row, far below the floor

    def _apply(self, fn: Any, recurse: bool = True) -> "UnitPolicy":
        """Keep float32 and float64 when a precision plugin converts the module."""
        before = {name: tensor.data for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        super()._apply(fn, recurse)
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            tensor.data = before[name].to(tensor.device)
        return self


class AllocationPolicy(UnitPolicy):
    """π(a) = Π Bernoulli(a_u; σ(φ_u)) over units u.

    Args:
        num_layers, num_heads: units of the model.
        per_layer: share one φ among the heads of a layer.
        initial: the probability of an open unit at the start.
    """

    def __init__(self, num_layers: int, num_heads: int, per_layer: bool, initial: float):
        super().__init__(num_layers, num_heads, 1 if per_layer else num_heads)
        self.logits = nn.Parameter(torch.logit(torch.full(self.shape, initial, dtype=torch.float32)))

    @property
    def probabilities(self) -> Logits:
        """Return each unit's probability to be open."""
        return torch.sigmoid(self.logits)

    def draw(self, num_generations: int, generator: torch.Generator) -> Bool[Tensor, "responses layers heads"]:
        """Draw allocations in antithetic pairs, u and 1 − u of one uniform sample.

        Args:
            num_generations: allocations of a group.
            generator: the random numbers of its prompt.
        """
        half, probabilities = -(-num_generations // 2), self.probabilities.detach()
        shape = (half, *probabilities.shape)
        u = torch.rand(shape, dtype=torch.float32, device=probabilities.device, generator=generator)
        pairs = torch.stack((u < probabilities, 1 - u < probabilities), dim=1).flatten(0, 1)
        return pairs[:num_generations]

    def log_likelihood(self, opened: Bool[Tensor, "responses layers heads"]) -> Float[Tensor, " responses"]:
        """Return log π(a) of each allocation."""
        sign = opened.to(self.logits.dtype) * 2 - 1
        return torch.nn.functional.logsigmoid(sign * self.logits).sum((1, 2))

    def ranked(self, num_open: int) -> Bool[Tensor, "layers heads"]:
        """Return an allocation in which the units with the largest φ are open."""
        flat = self.logits.detach().flatten()
        chosen = torch.zeros_like(flat, dtype=torch.bool)
        chosen[flat.argsort(descending=True, stable=True)[:num_open]] = True
        return chosen.view_as(self.logits)

    def sample(
        self,
        units: Units,
        num_generations: int,
        generators: Sequence[torch.Generator],
        prefill: str,
        with_reference: bool,
    ) -> "Allocation":
        """Draw an allocation for every response.

        Args:
            units: the model's units.
            num_generations: responses of a group.
            generators: one for each prompt.
            prefill: see DrawnAction.
            with_reference: let the first response of each group read everything.
        """
        self.clamp()  # before the draw, or the loss would clamp φ and find ratios other than 1
        opened = torch.cat([self.draw(num_generations, generator) for generator in generators])
        if with_reference:
            opened[::num_generations] = True
        with torch.no_grad():
            return Allocation(self, units, opened, prefill, self.log_likelihood(opened))

    def likelihoods(self, allocation: "Allocation") -> tuple[Float[Tensor, " responses"], Float[Tensor, " choices"]]:
        """Return log π(a) of each response, and the probabilities of open units."""
        self.clamp()
        return self.log_likelihood(allocation.opened), self.probabilities.detach().flatten()

    @torch.no_grad()
    def clamp(self) -> None:
        """Clamp φ, so that every unit keeps exploring."""
        self.logits.clamp_(-MAX_LOGIT, MAX_LOGIT)


@dataclass(frozen=True)
class Allocation(DrawnAction):
    """The allocation of every response.

    Args:
        policy: drew it.
        units: the model's units.
        opened: of each response, or of all if it has one row.
        prefill: see DrawnAction.
        old_logps: log π of each allocation when it was drawn.
        advantages: of each response, after the rollout was priced.
    """

    policy: UnitPolicy
    units: Units
    opened: Bool[Tensor, "rows layers units"]
    prefill: str
    old_logps: Float[Tensor, " rows"]
    advantages: Float[Tensor, " rows"] | None = None

    @property
    def costs(self) -> Float[Tensor, " rows"]:
        """Return the share of open units."""
        return self.opened.float().mean((1, 2))

    def as_drawn(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the model reads by the allocation."""
        return self.units.applied(model, spread(self.opened.float(), self.units))

    def counted(self, prompts: Bool[Tensor, "rows prompt"], responses: Bool[Tensor, "rows length"]) -> "Allocation":
        """Return the allocation, whose cost and likelihood depend on no token."""
        return self

    def cut(self, time: int) -> "Allocation":
        """Return the allocation, which holds for all tokens."""
        return self

    def select(self, rows: Int[Tensor, " rows"]) -> "Allocation":
        """Return the allocation of some responses."""
        if len(self.opened) == 1:
            return self
        advantages = None if self.advantages is None else self.advantages[rows]
        return replace(self, opened=self.opened[rows], old_logps=self.old_logps[rows], advantages=advantages)


@dataclass(frozen=True)
class SoftAllocation(SharedAction):
    """σ(φ) · full + (1 − σ(φ)) · local for all responses, with gradients to φ (RLKV, DuoAttention)."""

    policy: AllocationPolicy
    units: Units

    def applied(self, model: Any, part: Part = "response") -> AbstractContextManager[None]:
        """Return a context in which the model mixes by the current probabilities."""
        return self.units.applied(model, spread(self.policy.probabilities[None], self.units))


def least_probability() -> float:
    """Return the smallest probability of an open unit."""
    return 1 / (1 + math.exp(MAX_LOGIT))


def shared(opened: Bool[Tensor, "layers units"], policy: AllocationPolicy, units: Units) -> Allocation:
    """Return one allocation for all responses, by which prompts are read, too."""
    rows = opened[None]
    return Allocation(policy, units, rows, "allocated", rows.new_zeros(1, dtype=torch.float32))


def spread(share: Float[Tensor, "rows layers units"], units: Units) -> Share:
    """Return a share for every head."""
    return share.expand(-1, -1, units.num_heads)
