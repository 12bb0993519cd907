"""Adversarial streams of a million tokens that test, in float32 and bfloat16, that a memory remains finite.

    python scripts/adversarial.py --tokens 1000000 --output docs/data/adversarial.json

Writes are limited only by the default rule, memory_step "certified". Momenta go up to 0.99, and gates to their limits.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridmem.model.memory import write_bound
from hybridmem_kernels import memory_mlp_scan, memory_scan

DIM, PIECE = 8, 2_000
# Gates of each head: eta, constant as the rule requires, and alpha.
HEADS = ((0.0, "never"), (0.3, "never"), (0.8, "never"), (0.99, "never"), (0.99, "hardly"), (0.8, "all, at times"))


def keys(start: int, tokens: int) -> Tensor:
    """Return four key streams, (4, tokens, DIM).

    They are a constant key, two nearly opposite keys in turn, growing blocks of one key each, and random keys.
    """
    basis = F.normalize(torch.randn(4, DIM, generator=torch.Generator().manual_seed(0)), dim=-1)
    clock = torch.arange(start, start + tokens)
    opposite = F.normalize(-basis[0] + 0.1 * basis[1], dim=-1)
    flipped = torch.where((clock % 2 == 0)[:, None], basis[0], opposite)
    blocks = basis[clock.double().sqrt().long() % 4]
    noise = torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(1 + start))
    return torch.stack((basis[0].expand(tokens, DIM), flipped, blocks, F.normalize(noise, dim=-1)))


def values(start: int, tokens: int) -> Tensor:
    """Return four value streams, (4, tokens, DIM), with sign patterns that a momentum could resonate with."""
    clock = torch.arange(start, start + tokens)
    patterns = (torch.zeros_like(clock), clock, clock // 7, clock.double().sqrt().long())
    return torch.stack([1.0 - 2.0 * (pattern % 2) for pattern in patterns])[:, :, None].expand(4, tokens, DIM)


def gates(start: int, tokens: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha, eta and theta, (heads, tokens), with the largest theta that the rule allows."""
    clock = torch.arange(start, start + tokens)
    forgetting = {
        "never": torch.zeros(tokens),
        "hardly": torch.full((tokens,), 1e-4),
        "all, at times": (clock % 100 == 99).float(),
    }
    alpha = torch.stack([forgetting[how] for _, how in HEADS]).to(dtype)
    eta = torch.tensor([eta for eta, _ in HEADS])[:, None].expand(-1, tokens).to(dtype)
    return alpha, eta, (write_bound("certified", eta.float()) / depth).to(dtype)


@torch.no_grad()
def run(depth: int, dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Run all key streams with all value streams, and return the largest magnitudes of states and outputs."""
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(len(HEADS), DIM, DIM, generator=generator) * DIM**-0.5 for _ in range(depth)]
    state: Any = None
    largest = {"state": 0.0, "output": 0.0}
    for start in range(0, tokens, PIECE):
        size = min(PIECE, tokens - start)
        k = keys(start, size).repeat_interleave(4, 0)[:, None].expand(-1, len(HEADS), -1, -1).to(dtype)
        v = values(start, size).repeat(4, 1, 1)[:, None].expand(-1, len(HEADS), -1, -1).to(dtype)
        alpha, eta, theta = (gate.expand(16, -1, -1) for gate in gates(start, size, depth, dtype))
        if depth == 1:
            out, state = memory_scan(k, k, v, alpha, eta, theta, state)
            held = [state.weight, state.momentum]
        else:
            out, state = memory_mlp_scan(k, k, v, alpha, eta, theta, weights, state, max_grad_norm=1.0)
            held = [*state.weights, *state.momenta]
        for name, tensors in (("state", held), ("output", [out])):
            seen = max(tensor.abs().max().item() for tensor in tensors)  # NaN and inf propagate
            if not seen < float("inf"):
                return {"tokens": start + size, "finite": False, **largest}
            largest[name] = max(largest[name], seen)
    return {"tokens": tokens, "finite": True, **largest}


def main() -> None:
    """Run all cases, and exit with 1 if any number is non-finite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    for depth in options.depths:
        for dtype in (torch.float32, torch.bfloat16):
            begun = time.monotonic()
            figures.append({"depth": depth, "dtype": str(dtype), **run(depth, dtype, options.tokens)})
            print(figures[-1], f"{time.monotonic() - begun:.0f} s", flush=True)
    if options.output:
        command = " ".join(["python", *sys.argv])
        options.output.write_text(json.dumps({"command": command, "runs": figures}, indent=1) + "\n")
    sys.exit(not all(figure["finite"] for figure in figures))


if __name__ == "__main__":
    main()
