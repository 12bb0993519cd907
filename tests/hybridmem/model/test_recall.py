"""Recall beyond the window, which every variant with a memory learns and a window alone does not."""

import pytest
import torch
import torch.nn.functional as F

from hybridmem import HybridMemForCausalLM
from hybridmem.data import TaskDataModule
from hybridmem.tasks import Recall
from tests.hybridmem.models import tiny_config

pytestmark = pytest.mark.slow
WINDOW, LAST = 8, 10
LEARNT, BY_CHANCE = 0.7, 2.17  # nats per token over two letters and EOS; chance is two thirds of log 26


def trained_for(steps: int, variant: str) -> float:
    """Train on answers three or four windows back, until they are learnt; return the loss of the last ten steps."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=259, hidden_size=64, intermediate_size=96, num_attention_heads=2, head_dim=32)
    memory = dict(memory_heads=2, memory_head_dim=32, memory_chunk_size=32, attention_conv=True)
    reach = dict(attention_window=WINDOW, segment_length=WINDOW)
    model = HybridMemForCausalLM(tiny_config(variant=variant, **sizes, **memory, **reach))
    task = Recall(num_pairs=4, value_length=2, num_distractors=0, window=WINDOW, distance=[3, 4])
    data = TaskDataModule(task, batch_size=32)
    data.setup("fit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for _, batch in zip(range(steps), data.train_dataloader(), strict=False):
        logits = model(batch["input_ids"], document_ids=batch["document_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if len(losses) >= LAST and sum(losses[-LAST:]) < LEARNT * LAST:
            break
    return sum(losses[-LAST:]) / LAST


@pytest.mark.parametrize("variant", ["mag", "mac", "mal", "lmm"])
def test_a_memory_learns_it(variant):
    assert trained_for(150, variant) < LEARNT


def test_a_window_alone_does_not():
    assert trained_for(150, "swa") > 0.9 * BY_CHANCE
