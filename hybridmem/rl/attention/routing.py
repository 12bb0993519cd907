"""Routers, which decide for each token, layer by layer, and the decisions they draw.

A token that a router opens reads beyond its window (HeadUnits and others) or is stored in the memory (MemoryUnits).
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hybridmem.model.memory import router_scores

from .action import Part, SharedAction
from .allocations import MAX_LOGIT, DrawnAction, UnitPolicy, Units
from .passes import NewTokens, before_passes

Inputs = Float[Tensor, "rows time hidden"]  # a layer's normed input


class RouterPolicy(UnitPolicy):
    """π(a | x) = Π Bernoulli(a_lt; σ(φ_l(x_lt))) over layers l and tokens t, with a linear φ_l for each layer.

    The logits of all tokens lie within ±MAX_LOGIT, so that every token keeps exploring.

    Args:
        num_layers, num_heads: units of the model.
        hidden_size: of the layers' inputs.
        initial: probability of an open token at the start.
    """

    def __init__(self, num_layers: int, num_heads: int, hidden_size: int, initial: float):
        super().__init__(num_layers, num_heads, 1)
        start = torch.logit(torch.tensor(initial)) / MAX_LOGIT
        self.weight = nn.Parameter(torch.zeros(num_layers, hidden_size))
        self.bias = nn.Parameter((MAX_LOGIT * torch.atanh(start.clamp(-0.99, 0.99))).expand(num_layers).clone())

    def logits(
        self, x: Float[Tensor, "*rows hidden"], weight: Float[Tensor, "*#rows hidden"], bias: Float[Tensor, "*#rows"]
    ) -> Float[Tensor, "*rows"]:
        """Return φ of tokens from their layers' inputs.

        Inputs have unit variance and are divided by their number, so that a step of the optimiser moves a logit by
        about the learning rate, in models of any width.
        """
        return MAX_LOGIT * torch.tanh(router_scores(x, weight, bias) / MAX_LOGIT)

    @torch.no_grad()
    def probabilities(self, place: int, x: Inputs) -> Float[Tensor, "rows time"]:
        """Return the probability of every token to be open in a layer."""
        return torch.sigmoid(self.logits(x, self.weight[place], self.bias[place]))

    def sample(
        self,
        units: Units,
        num_generations: int,
        generators: Sequence[torch.Generator],
        prefill: str,
        with_reference: bool,
    ) -> "RoutedRollout":
        """Return the action that draws decisions during a rollout (see AllocationPolicy.sample)."""
        return RoutedRollout(self, units, prefill, num_generations, generators, with_reference)

    def likelihoods(self, routing: "Routing") -> tuple[Float[Tensor, " responses"], Float[Tensor, " choices"]]:
        """Return log π(a) of each response, and the probabilities of its tokens to be open."""
        logits = self.logits(routing.inputs, self.weight[:, None], self.bias[:, None])
        each = nn.functional.logsigmoid(torch.where(routing.decisions, logits, -logits))
        counts = routing.counts[:, None].expand_as(logits)
        return torch.where(counts, each, 0).sum((1, 2)), torch.sigmoid(logits.detach())[counts]


@dataclass(frozen=True)
class Routing(DrawnAction):
    """The decisions of every response, which passes over it repeat.

    Args:
        policy: drew them.
        units: the model's units.
        prefill: see DrawnAction.
        opened: True if a token is open; prompt first.
        inputs: of the layers at the last tokens, where decisions were drawn.
        counts: True for tokens that a response depends on.
        old_logps: log π of each response's decisions when they were drawn.
        advantages: of each response, after the rollout was priced.
    """

    policy: RouterPolicy
    units: Units
    prefill: str
    opened: Bool[Tensor, "rows layers time"]
    inputs: Float[Tensor, "rows layers drawn hidden"]
    counts: Bool[Tensor, "rows drawn"]
    old_logps: Float[Tensor, " rows"]
    advantages: Float[Tensor, " rows"] | None = None

    @property
    def decisions(self) -> Bool[Tensor, "rows layers drawn"]:
        """Return the decisions that were drawn."""
        return self.opened[:, :, self.opened.shape[2] - self.inputs.shape[2] :]

    @property
    def costs(self) -> Float[Tensor, " rows"]:
        """Return the share of open tokens, over all layers."""
        beyond = (self.decisions & self.counts[:, None]).float().sum((1, 2))
        return beyond / (self.counts.sum(1) * self.opened.shape[1]).clamp(min=1)

    @contextmanager
    def as_drawn(self, model: Any) -> Iterator[None]:
        """Run with the decisions; tokens that the rollout did not read are open."""
        new = NewTokens(0, 0, None)

        def begin(tokens: NewTokens) -> None:
            nonlocal new
            new = tokens

        def repeat(place: int, x: Inputs) -> Float[Tensor, "rows time"]:
            opened = self.opened[:, place, new.past : new.past + new.length]
            return nn.functional.pad(opened.to(x.dtype), (0, new.length - opened.shape[1]), value=1)

        with before_passes(model, begin), self.units.routed(model, repeat):
            yield

    def cut(self, time: int) -> "Routing":
        """Return the decisions, which end with the last token that was read."""
        return self

    def select(self, rows: Int[Tensor, " rows"]) -> "Routing":
        """Return the decisions of some responses."""
        names = ("opened", "inputs", "counts", "old_logps", "advantages")
        found = {name: value[rows] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **found)

    def counted(self, prompts: Bool[Tensor, "rows prompt"], responses: Bool[Tensor, "rows length"]) -> "Routing":
        """Return the decisions with the tokens that count: those on which a token of the response depends.

        Padding, a response's last token and later writes do not count.

        Args:
            prompts: False for padding.
            responses: True for the policy's own tokens, between which an environment's stand.
        """
        later = responses[:, 1:].flip(1).cummax(1).values.flip(1)  # the policy speaks after the token
        first = self.opened.shape[2] - self.inputs.shape[2]
        read = torch.cat((prompts, later), dim=1)[:, first : self.opened.shape[2]]
        counted = replace(self, counts=self.units.counted(read))
        with torch.no_grad():
            return replace(counted, old_logps=self.policy.likelihoods(counted)[0])


@dataclass(frozen=True)
class RoutedRollout(DrawnAction):
    """Decisions that are drawn while responses are sampled, in antithetic pairs u and 1 − u.

    Args:
        policy: draws them.
        units: the model's units.
        prefill: see DrawnAction.
        num_generations: responses of a group.
        generators: one for each prompt.
        with_reference: all tokens of each group's first response are open.
    """

    policy: RouterPolicy
    units: Units
    prefill: str
    num_generations: int
    generators: Sequence[torch.Generator]
    with_reference: bool
    opened: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # by layer, pass by pass
    inputs: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    begun: list[NewTokens] = field(default_factory=list)

    @contextmanager
    def as_drawn(self, model: Any) -> Iterator[None]:
        """Run with decisions that are drawn as the model reads."""
        numbers: Float[Tensor, "rows layers time"]

        def begin(new: NewTokens) -> None:
            nonlocal numbers
            self.begun.append(new)
            numbers = self._numbers(new)

        def draw(place: int, x: Inputs) -> Float[Tensor, "rows time"]:
            opened = numbers[:, place] < self.policy.probabilities(place, x)
            if self.with_reference:
                opened[:: self.num_generations] = True
            self.opened[place].append(opened)
            self.inputs[place].append(x.detach())
            return opened.to(x.dtype)

        with before_passes(model, begin), self.units.routed(model, draw):
            yield

    def cut(self, time: int) -> Routing:
        """Return the decisions so far."""
        layers, rows = self.policy.shape[0], len(self.generators) * self.num_generations
        weight = self.policy.weight
        if self.begun:
            opened, inputs = (
                torch.stack([torch.cat(found[place], dim=1) for place in range(layers)], dim=1)
                for found in (self.opened, self.inputs)
            )
            opened = nn.functional.pad(opened, (self.begun[0].past, 0), value=True)  # prompts with prefill=full
        else:  # every response has a single token, which no pass reads
            opened = torch.zeros(rows, layers, 0, dtype=torch.bool, device=weight.device)
            inputs = weight.new_zeros(rows, layers, 0, weight.shape[1])
        counts = torch.ones(inputs.shape[::2], dtype=torch.bool, device=weight.device)
        return Routing(self.policy, self.units, self.prefill, opened, inputs, counts, weight.new_zeros(rows))

    def select(self, rows: Int[Tensor, " rows"]) -> Routing:
        """Return the decisions of some responses so far."""
        return self.cut(0).select(rows)

    def _numbers(self, new: NewTokens) -> Float[Tensor, "rows layers time"]:
        """Draw uniform numbers for new tokens; padding takes none, so that they are independent of the batch."""
        times, layers, device = self.num_generations, self.policy.shape[0], self.policy.weight.device
        each = []
        for place, generator in enumerate(self.generators):
            count = new.length if new.mask is None else int(new.mask[place * times].sum())
            u = torch.rand(-(-times // 2), count, layers, device=device, generator=generator).mT
            pairs = torch.stack((u, 1 - u), dim=1).flatten(0, 1)[:times]
            each.append(nn.functional.pad(pairs, (new.length - count, 0)))
        return torch.cat(each)


@dataclass(frozen=True)
class SettledRouting(SharedAction):
    """Tokens are open if their probability is above a half."""

    policy: RouterPolicy
    units: Units

    def decide(self, place: int, x: Inputs) -> Float[Tensor, "rows time"]:
        """Return 1 for open tokens in a layer, and 0 for others."""
        return (self.policy.probabilities(place, x) > 0.5).to(x.dtype)

    def applied(self, model: Any, part: Part = "response") -> AbstractContextManager[None]:
        """Return a context in which every token decides by itself."""
        return self.units.routed(model, self.decide)
