"""Probes sample like the policy, record its attention, and leave no trace."""

from types import SimpleNamespace
from unittest.mock import Mock

import lightning as L
import pytest
import torch

from hybridmem.data import TaskDataModule
from hybridmem.rl import GRPO, AttentionRecorder
from hybridmem.rl.attention.distributions import distribution
from hybridmem.rl.rewards.functions import RewardSum
from hybridmem.rl.rollouts.policy import Policy
from hybridmem.rl.rollouts.sampling import Sampling
from hybridmem.tasks import VisualSearch
from hybridmem.training import PolicyModule
from hybridmem.training.callbacks.policy_probe import is_due, record_answers
from hybridmem.training.policy.rollout_worker import LocalSampler, RolloutWorker
from tests.hybridmem.models import tiny_model
from tests.hybridmem.training.policy.test_module import Letters


def policy(variant="mag", task=None, **changes):
    """Return a policy between two steps, without a run."""
    module = PolicyModule("x", [GRPO()])
    module.model = tiny_model(torch.float32, vocab_size=259, variant=variant, **changes).train()
    module.data = TaskDataModule(task or Letters(), mode="prompts")
    module.data.setup("validate")
    own = Policy(module.model, module.data)
    rewards = RewardSum([module.data.task.reward])
    sampling = Sampling(max_completion_length=5)
    module.worker = RolloutWorker(own, module.objectives, rewards, LocalSampler(), None, 8, sampling, 0, module.meter)
    precision = SimpleNamespace(forward_context=torch.no_grad)
    module._trainer = Mock(spec=L.Trainer, precision_plugin=precision, global_rank=0)
    return module


def look(module, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(**dict(max_completion_length=5) | changes)
    return record_answers(module.worker, Letters().example("val", 0), 3, sampling, [-1], generator)


def test_multiples_are_due_however_many_steps_a_batch_takes():
    due = [step for step in range(0, 40, 4) if is_due(step, step - 4, 10)]
    assert due == [0, 12, 20, 32]
    assert not is_due(12, 12, 10)  # a batch without an optimiser step


@pytest.mark.parametrize("variant", ["mag", "mac", "swa"])
def test_records_are_those_of_the_whole_text(variant):
    module = policy(variant)
    answers = look(module)
    module.model.eval()
    with torch.no_grad(), AttentionRecorder(module.model, [-1]) as recorder:
        module.model(input_ids=answers.ids)
    length = answers.completions.ids.shape[1]
    expected = distribution(recorder.records[1], "attention", length)
    torch.testing.assert_close(distribution(answers.records[1], "attention", length), expected)
    assert answers.ids.shape == (3, 4 + length)


def test_patches_stand_before_the_text():
    module = policy(task=VisualSearch(grid=2), hidden_size=64)
    example = module.data.task.example("val", 0)
    inverted = {**example, "images": 1 - example["images"]}
    sampling = Sampling(max_completion_length=3)
    first, other = (record_answers(module.worker, seen, 2, sampling, [-1]) for seen in (example, inverted))
    prompt = len(example["images"]) + len(example["prompt"])
    assert first.ids.shape[1] == prompt + first.completions.ids.shape[1]
    assert (first.records[1].attention.k[:, :, 2] != other.records[1].attention.k[:, :, 2]).any()


def test_a_look_is_the_same_for_the_same_random_numbers_and_leaves_no_trace():
    module = policy()
    before = torch.get_rng_state(), module.worker.num_rollouts
    first, same, other = look(module), look(module), look(module, seed=1)
    assert torch.equal(first.ids, same.ids)
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert module.worker.num_rollouts == before[1]
    assert module.model.training
