"""Group-relative advantages, which are exactly 0 for equal rewards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybridmem.rl.objectives.advantages import SCALES, group_advantages, groups_with_signal

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@given(
    value=st.floats(-1e4, 1e4),
    num_generations=st.integers(2, 17),
    groups=st.integers(1, 4),
    scale=st.sampled_from(SCALES),
    dtype=st.sampled_from(DTYPES),
)
def test_equal_rewards_have_no_advantage(value, num_generations, groups, scale, dtype):
    rewards = torch.full((groups * num_generations,), value, dtype=dtype)
    assert (group_advantages(rewards, num_generations, scale) == 0).all()
    assert not groups_with_signal(rewards, num_generations).any()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_equal_rewards_have_no_advantage(dtype, scale, sign):
    rewards = torch.full((16,), sign * torch.finfo(dtype).max, dtype=dtype)
    rewards[:8] /= 2  # their mean fits, but that of the others overflows
    assert (group_advantages(rewards, 8, scale) == 0).all()


@given(rewards=st.lists(st.sampled_from([0.1, 0.3, 0.7, 1.1]), min_size=5, max_size=5), scale=st.sampled_from(SCALES))
def test_groups_without_signal_have_zero_advantages(rewards, scale):
    both = torch.tensor([*rewards, *[0.7] * 5])
    advantages = group_advantages(both, 5, scale)
    assert (advantages[5:] == 0).all()
    if len(set(rewards)) > 1:
        assert advantages[:5].abs().max() > 0
        assert advantages[:5].sum().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("value", [0.1, 0.7, 1.1, 1e-3])
def test_adam_does_not_move_without_signal(value):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        (group_advantages(torch.full((21,), value), 7) @ weight.repeat(7)).backward()
        optimizer.step()
    assert weight.tolist() == [1, 1, 1]
