"""Losses, advantages and rewards equal those of TRL's GRPOTrainer."""

from dataclasses import asdict, replace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from hybridmem.data.tokenizer import byte_tokenizer
from hybridmem.rl import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    DrGRPO,
    FormatReward,
    OverlongPenalty,
    RewardSum,
    group_advantages,
    groups_with_signal,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

RESPONSES, LENGTH, GENERATIONS, MAX_LENGTH = 8, 6, 4, 9
OURS_ALONE = {"dynamic_sampling"}


def vowels(completions, **kwargs):
    """Return rewards that differ within a group, and None for some samples."""
    return [None if text.startswith("z") else sum(map(text.count, "aeiou")) / 3 for text in completions]


async def shortness(completion_ids, **kwargs):
    return [-len(ids) / 7 for ids in completion_ids]


def trainer_of(objective, tmp_path, reward_funcs=(vowels,), **settings) -> GRPOTrainer:
    """Return TRL's trainer of a tiny model with an objective's settings."""
    fields = {name: value for name, value in asdict(objective).items() if name not in OURS_ALONE}
    if isinstance(objective, CISPO):
        fields["loss_type"] = "cispo"
    # Skip loading the reference model; its log-probabilities are given below.
    beta = fields.pop("beta")
    arguments = GRPOConfig(
        output_dir=tmp_path,
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_completion_length=MAX_LENGTH,
        num_generations=GENERATIONS,
        per_device_train_batch_size=RESPONSES,
        steps_per_generation=2,
        **fields,
        **settings,
    )
    sizes = dict(vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    trainer = GRPOTrainer(
        model=LlamaForCausalLM(LlamaConfig(**sizes)),
        reward_funcs=list(reward_funcs),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a"}]),
        processing_class=byte_tokenizer(),
    )
    trainer.beta = beta
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def responses(seed=0):
    """Return log-probabilities under policy, rollout and reference, advantages, and a mask with one empty response."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(RESPONSES, LENGTH, generator=generator)
    old_logps, ref_logps = (logps + 0.6 * torch.randn(logps.shape, generator=generator) for _ in range(2))
    advantages = torch.randn(RESPONSES, generator=generator)
    lengths = torch.tensor([LENGTH, 5, 4, 3, 2, 1, 0, LENGTH])
    return logps.requires_grad_(), old_logps, ref_logps, advantages, torch.arange(LENGTH) < lengths[:, None]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    "objective",
    [
        GRPO(),
        GRPO(delta=1.5),
        GRPO(use_bias_correction_kl=True),
        GRPO(loss_type="bnpo", epsilon=0.1, epsilon_high=0.4),
        DrGRPO(),
        DAPO(),
        GSPO(),
        GSPO(epsilon=0.1, epsilon_high=0.2, use_bias_correction_kl=True),
        CISPO(epsilon_high=1.2),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_the_loss_is_trls(objective, beta, tmp_path):
    objective = replace(objective, beta=beta)
    logps, old_logps, ref_logps, advantages, mask = responses()
    tokens_of_all_calls = 2 * int(mask.sum()) + 3  # the generation batch has two calls

    trainer = trainer_of(objective, tmp_path)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logps, torch.zeros_like(logps), None)
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = dict(
        prompt_ids=ids,
        prompt_mask=torch.ones_like(ids),
        completion_ids=ids,
        completion_mask=mask.long(),
        old_per_token_logps=old_logps,
        ref_per_token_logps=ref_logps,
        advantages=advantages,
        num_items_in_batch=torch.tensor(tokens_of_all_calls),
    )
    expected = trainer._compute_loss(trainer.model, inputs)
    (expected_gradient,) = torch.autograd.grad(expected, logps)

    loss, metrics = objective.compute_loss(
        logps, old_logps, advantages, mask, ref_logps if beta else None, tokens_of_all_calls / 2, MAX_LENGTH
    )
    (gradient,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-6)
    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    # TRL counts the ratio of the empty response as not clipped.
    ratios = (RESPONSES - 1) / RESPONSES if objective.importance_sampling_level == "sequence" else 1
    assert ("kl" in metrics) == bool(beta)
    for name, value in metrics.items():
        assert value.item() * (1 if name == "kl" else ratios) == pytest.approx(logged[name], abs=1e-6), name


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_rewards_and_advantages_are_trls(scale_rewards, mask_truncated, tmp_path):
    objective = GRPO(scale_rewards=scale_rewards, mask_truncated_completions=mask_truncated, beta=0.0)
    tokenizer = byte_tokenizer()
    texts = ["aei", "xyz", "zoo", "aeiouaei", "hello", "hello", "hello", "hello"]
    ended = torch.tensor([True] * 3 + [False] + [True] * 4)
    ids = [[*text.encode(), *[tokenizer.eos_token_id] * end] for text, end in zip(texts, ended.tolist(), strict=True)]
    prompts = ["a"] * GENERATIONS + ["b"] * GENERATIONS

    trainer = trainer_of(objective, tmp_path, [vowels, shortness], reward_weights=[1.0, 0.5])
    trainer._generate = lambda _: ([[97]] * RESPONSES, ids, None, texts, None, {}, None, None)
    batch = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])

    summed = RewardSum([vowels, shortness], reward_weights=[1.0, 0.5])
    rewards = summed(prompts, texts, ids)
    advantages = group_advantages(rewards.total, GENERATIONS, scale_rewards)
    torch.testing.assert_close(advantages, batch["advantages"], atol=1e-6, rtol=1e-6)

    logged = {name: values[0] for name, values in trainer._metrics["train"].items()}
    for name, value in summed.metrics(rewards).items():
        assert value.item() == pytest.approx(logged[name], abs=1e-6), name
    if scale_rewards != "batch":
        silent = 1 - groups_with_signal(rewards.total, GENERATIONS).float().mean().item()
        assert silent == logged["frac_reward_zero_std"] == 0.5

    longest = max(map(len, ids))
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in ids])
    assert torch.equal(objective.loss_mask(mask, ~ended), batch["completion_mask"].bool())


def test_trls_reward_functions_work_unchanged():
    """The project's reward functions also replace TRL's."""
    texts = ["<think>\nwell\n</think>\nyes", "yes"]
    ids = [list(text.encode()) for text in texts]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    theirs = RewardSum([think_format_reward, get_soft_overlong_punishment(30, 20)])
    theirs.check_columns(["prompt", "answer"])
    ours = RewardSum([FormatReward("<think>(?!.*<think>)(.*?)</think>.*"), OverlongPenalty(30, 20)])
    expected = theirs(["a", "b"], messages, ids, answer=[1, 2])
    torch.testing.assert_close(ours(["a", "b"], messages, ids).per_function, expected.per_function)
