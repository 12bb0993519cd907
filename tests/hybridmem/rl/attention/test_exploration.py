"""Recovery of a corrupted gate by reward alone, a problem with a known solution."""

import torch
from torch import Tensor

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.rl import AttentionRecorder, AttentionRL, group_advantages
from hybridmem.rl.attention.exploration import Exploration, draw_noise, explored
from hybridmem.rl.rollouts.prompts import PromptBatch
from hybridmem.rl.rollouts.sampling import Sampling, sample
from hybridmem.rl.rollouts.scoring import completion_logps

KEYS, VALUES, PAIRS, GENERATIONS = 8, 8, 4, 16


def questions(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return rows of key, value, …, asked key, and their answers; the pair lies beyond a window of 2."""
    keys = torch.stack([torch.randperm(KEYS, generator=generator)[:PAIRS] for _ in range(count)])
    values = torch.randint(KEYS, KEYS + VALUES, (count, PAIRS), generator=generator)
    asked = torch.randint(PAIRS - 1, (count, 1), generator=generator)
    rows = torch.stack((keys, values), dim=-1).flatten(1)
    return torch.cat((rows, keys.gather(1, asked)), dim=1), values.gather(1, asked)[:, 0]


def trained_model(generator: torch.Generator) -> HybridMemForCausalLM:
    """Train a layer to answer from its memory, because its window is too short."""
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    memory = dict(memory_heads=1, memory_head_dim=32, memory_chunk_size=16, num_persistent_tokens=0)
    settings = dict(num_key_value_heads=2, attention_window=2, attention_conv=True, initializer_range=0.1)
    model = HybridMemForCausalLM(HybridMemConfig(vocab_size=KEYS + VALUES, **shape, **memory, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        rows, answers = questions(64, generator)
        logits = model(rows, use_cache=False, logits_to_keep=1).logits[:, -1]
        torch.nn.functional.cross_entropy(logits, answers).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: HybridMemForCausalLM) -> float:
    """Return the accuracy of greedy answers on new questions."""
    rows, answers = questions(512, torch.Generator().manual_seed(99))
    return float((model(rows, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1) == answers).float().mean())


def test_a_spoilt_gate_recovers_by_reward_alone():
    generator = torch.Generator().manual_seed(0)
    model = trained_model(generator)
    gate = model.model.layers[0].mixer.allocation_gate
    assert accuracy(model) > 0.98
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.fill_(4.0)  # gives the window 98 % of every token's mixture
    assert accuracy(model) < 0.3

    model.requires_grad_(False)
    gate.requires_grad_(True)
    objective = AttentionRL(target="allocation", exploration=1.0, positions="predicting")
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    for _ in range(10):
        rows, answers = questions(16, generator)
        prompts = PromptBatch(rows, None)
        noise = draw_noise(model, "allocation", [0], 1.0, 16, GENERATIONS, rows.shape[1] + 1, generator)
        own_prompts = [Exploration("allocation", {})]
        with explored(model, "allocation", noise), AttentionRecorder(model) as recorder:
            one_token = Sampling(max_completion_length=1)
            completions = sample(model, prompts, GENERATIONS, one_token, [], 0, generator, own_prompts)
            completion_logps(model, prompts.repeat(GENERATIONS), completions, 1.0)
        used = {n: record.detach() for n, record in recorder.records.items()}
        rewards = (completions.ids[:, 0] == answers.repeat_interleave(GENERATIONS)).float()
        advantages = group_advantages(rewards, GENERATIONS, "none")
        for _ in range(2):
            with AttentionRecorder(model) as recorder:
                completion_logps(model, prompts.repeat(GENERATIONS), completions, 1.0)
            loss, _ = objective.compute_loss(recorder.records, used, advantages, completions.mask, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert accuracy(model) > 0.9
