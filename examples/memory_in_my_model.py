"""Put a neural memory in a model of your own: one operator, a state that goes in and comes out.

    python examples/memory_in_my_model.py

The model reads pairs of a key and a value, then keys alone, and learns in half a minute to answer with the values.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from hybridmem.cli.console import run_script
from hybridmem_kernels import memory_scan

KEYS, VALUES = 64, 16  # value 0 marks a question


class MemoryModel(nn.Module):
    def __init__(self, width: int = 64, heads: int = 2):
        super().__init__()
        self.key, self.value = nn.Embedding(KEYS, width), nn.Embedding(VALUES, width)
        self.qkv, self.gates = nn.Linear(width, 3 * width), nn.Linear(width, 3 * heads)
        self.heads, self.out = heads, nn.Linear(width, VALUES)
        nn.init.constant_(self.gates.bias, -2.0)  # forget little, little momentum, small steps

    def forward(self, keys, values, state=None):
        x = self.key(keys) + self.value(values)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # batch, heads, time, dim
        alpha, eta, theta = self.gates(x).sigmoid().unflatten(-1, (3, self.heads)).permute(2, 0, 3, 1)
        theta = theta * 2 * (1 - eta) ** 2 / (1 + eta)  # never so large that the memory grows
        out, state = memory_scan(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, alpha, eta, theta, state)
        return self.out(x + out.transpose(1, 2).flatten(-2)), state


def pairs_then_questions(batch: int, pairs: int):
    keys = torch.rand(batch, KEYS).argsort(dim=1)[:, :pairs]
    values = torch.randint(1, VALUES, (batch, pairs))
    return keys.repeat(1, 2), F.pad(values, (0, pairs)), values


def main(steps: int = 600, pairs: int = 12):
    """Train, and read a row in two pieces.

    Args:
        steps: optimiser steps.
        pairs: pairs of a key and a value in each row, up to 64.
    """
    if not 1 <= pairs <= KEYS:
        sys.exit(f"--pairs {pairs} must be between 1 and {KEYS}")
    torch.manual_seed(0)
    model = MemoryModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        keys, values, answers = pairs_then_questions(64, pairs)
        logits = model(keys, values)[0][:, pairs:]
        loss = F.cross_entropy(logits.mT, answers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss:.3f}, {(logits.argmax(-1) == answers).float().mean():.0%} of the answers are right")

    first, state = model(keys[:, :pairs], values[:, :pairs])
    rest, state = model(keys[:, pairs:], values[:, pairs:], state)
    print(f"in two pieces it differs by {(torch.cat((first, rest), 1) - model(keys, values)[0]).abs().max():.1e}")


if __name__ == "__main__":
    run_script(main)
