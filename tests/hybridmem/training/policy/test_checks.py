"""Errors for objectives that cannot be combined, and custom objectives without registration."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from jaxtyping import Float
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from hybridmem.rl import DAPO, GRPO, SFT, AllocationRL, AttentionRL, Objective
from hybridmem.training.policy.checks import by_family, check_settings, check_strategy

SETTINGS = dict(
    num_generations=4,
    num_iterations=2,
    steps_per_generation=1,
    max_turns=1,
    call_format="plain",
    max_observation_length=1,
    max_empty_rollouts=1,
)


@dataclass(frozen=True)
class Mine(Objective):
    """Custom objective without an explicit family: the mean log-probability."""

    def loss(self, policy, batch, scores, old, temperature) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return the negative mean log-probability."""
        return -scores.logps.mean(), {"mean": scores.logps.mean().detach()}


@dataclass(frozen=True)
class Given(Mine):
    """Objective that learns from given answers and can be combined with others."""

    samples: ClassVar[bool] = False


@dataclass(frozen=True)
class Refining(Mine):
    """Objective that adds responses."""

    refines: ClassVar[bool] = True


def test_the_family_defaults_to_the_class_name():
    assert list(by_family([Mine(), GRPO()])) == ["Mine", "TokenObjective"]


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ([], "objectives is empty"),
        ([GRPO(), DAPO()], "objectives has 2 of family TokenObjective; keep one"),
        ([GRPO(), SFT()], "SFT learns from given answers and samples no responses: remove it, or the others"),
        ([GRPO(), Given()], "some learn from given answers and others from samples"),
    ],
)
def test_combinations_that_cannot_work(objectives, message):
    with pytest.raises(ValueError, match=message):
        by_family(objectives)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ([DAPO(), AttentionRL(exploration=1.0)], "exploration is incompatible with dynamic_sampling"),
        ([Refining(), AttentionRL(exploration=1.0)], "exploration is incompatible with Refining"),
        ([Refining(), DAPO()], "dynamic_sampling drops the groups that Refining refines"),
    ],
)
def test_ways_to_sample_that_exclude_one_another(objectives, message):
    with pytest.raises(ValueError, match=message):
        check_settings(by_family(objectives), **SETTINGS)


def test_traits_have_defaults():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert Mine().loss_mask(mask, torch.zeros(2, dtype=torch.bool)) is mask
    assert Mine().normaliser == "tokens"
    assert not Mine().explores
    assert Mine().trains_head
    assert Mine().trains_model
    assert Mine().reads_scores


def test_sharded_models_train_no_shared_prefill():
    objectives = {"TokenObjective": GRPO(), "Allocation": AllocationRL()}
    with pytest.raises(ValueError, match="set prefill to allocated"):
        check_strategy(ModelParallelStrategy(), objectives)
    check_strategy(ModelParallelStrategy(), {"Allocation": AllocationRL()})
    check_strategy(ModelParallelStrategy(), objectives | {"Allocation": AllocationRL(prefill="allocated")})
