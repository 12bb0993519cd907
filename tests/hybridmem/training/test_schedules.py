"""Learning rate schedules at their characteristic points."""

import pytest
import torch

from hybridmem.training import WarmupCosine, WarmupStableDecay


def rates(schedule, **settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = schedule(optimizer, 100, **settings)
    values = []
    for _ in range(101):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


def test_warmup_cosine():
    values = rates(WarmupCosine, warmup_steps=10, final_ratio=0.1)
    assert values[0] == pytest.approx(0.2)
    assert values[9] == values[10] == pytest.approx(2.0)
    assert values[55] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert values[100] == pytest.approx(0.2)


def test_warmup_stable_decay():
    values = rates(WarmupStableDecay, warmup_steps=10, decay_share=0.2)
    assert values[10:80] == pytest.approx([2.0] * 70)
    assert values[90] == pytest.approx(1.0)
    assert values[100] == 0


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(
        ValueError, match=r"lower model.init_args.lr_scheduler.init_args.warmup_steps or raise trainer.max_steps"
    ):
        rates(WarmupCosine, warmup_steps=100)


def test_the_limits_of_a_run_shorter_than_its_warmup_are_named():
    with pytest.raises(ValueError, match=r"the run's 100 optimiser steps; .* max_epochs or limit_train_batches"):
        rates(WarmupStableDecay, warmup_steps=100)
