"""Variable tracking: chains of assignments hidden in text, and a question about the variables of one chain."""

from itertools import pairwise
from string import ascii_uppercase

import numpy as np

from .puzzle import Material, Puzzle, scatter

NAME_LENGTH = 5


def variable_tracking(material: Material, rng: np.random.Generator, num_chains: int = 1, num_hops: int = 4) -> Puzzle:
    """Hide chains of `num_hops` + 1 variables in text, each in order; ask for the variables of the first."""
    names = draw_names(num_chains * (num_hops + 1), rng)
    values = (rng.choice(90_000, num_chains, replace=False) + 10_000).tolist()
    chains = [names[n::num_chains] for n in range(num_chains)]
    statements = [
        [f"VAR {chain[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in pairwise(chain))]
        for chain, value in zip(chains, values, strict=True)
    ]
    waiting = [iter(own) for own in statements]
    turns = rng.permutation(np.repeat(np.arange(num_chains), num_hops + 1))
    mixed = [next(waiting[n]) for n in turns]
    depths = np.sort(rng.random(len(mixed)))
    seed = int(rng.integers(2**63))
    return Puzzle(
        task="The text below assigns values to variables, directly or from other variables. Keep track of them.",
        context=lambda size: scatter(material.text(size, np.random.default_rng(seed)), mixed, depths),
        question=f"Which {num_hops + 1} variables have the value {values[0]}?",
        beginning=f"The variables with the value {values[0]} are",
        answers=chains[0],
    )


def draw_names(count: int, rng: np.random.Generator) -> list[str]:
    """Return different names of random capital letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(ascii_uppercase[n] for n in rng.integers(26, size=NAME_LENGTH))] = None
    return list(names)
