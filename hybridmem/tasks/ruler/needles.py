"""Needles: magic numbers of keys, hidden in text or among other needles."""

from collections.abc import Callable

import numpy as np

from .puzzle import Material, Puzzle, join_words, scatter

SMALLEST, LARGEST = 10**6, 10**7 - 1  # values have seven digits
NEEDLE = "The magic number of {key} is {value}."
LINE = 48  # characters of a typical needle and its line's end


def needles(
    material: Material, rng: np.random.Generator, num_keys: int = 1, num_values: int = 1, num_asked: int = 1
) -> Puzzle:
    """Hide `num_keys` keys with `num_values` values each in text; ask for all values of `num_asked` keys."""
    pairs = rng.choice(len(material.words) ** 2, num_keys, replace=False)
    keys = [spell_key(material.words, pair) for pair in pairs.tolist()]
    values = rng.choice(LARGEST + 1 - SMALLEST, (num_keys, num_values), replace=False) + SMALLEST
    hidden = [NEEDLE.format(key=key, value=value) for key, own in zip(keys, values, strict=True) for value in own]
    statements = [hidden[n] for n in rng.permutation(len(hidden))]
    depths = np.sort(rng.random(len(statements)))
    asked = rng.choice(num_keys, num_asked, replace=False).tolist()
    seed = int(rng.integers(2**63))

    def context(size: int) -> str:
        return scatter(material.text(size, np.random.default_rng(seed)), statements, depths)

    return _ask([keys[n] for n in asked], [str(value) for n in asked for value in values[n]], context)


def needle_among_needles(material: Material, rng: np.random.Generator) -> Puzzle:
    """Hide a needle among needles of other keys, one to a line, without any other text."""
    pairs = len(material.words) ** 2
    pair, value = int(rng.integers(pairs)), int(rng.integers(SMALLEST, LARGEST + 1))
    depth, seeds = rng.random(), rng.integers(2**63, size=2).tolist()

    def context(size: int) -> str:
        others, values = (np.random.default_rng(seed) for seed in seeds)
        drawn = others.integers(pairs, size=size // LINE).tolist(), values.integers(SMALLEST, LARGEST + 1, size // LINE)
        found = [(other, number) for other, number in zip(*drawn, strict=True) if other != pair]
        found.insert(round(depth * len(found)), (pair, value))
        return "\n".join(NEEDLE.format(key=spell_key(material.words, key), value=number) for key, number in found)

    return _ask([spell_key(material.words, pair)], [str(value)], context)


def spell_key(words: list[str], pair: int) -> str:
    """Return the key of a number below the square of the number of words."""
    first, second = divmod(pair, len(words))
    return f"{words[first]}-{words[second]}"


def _ask(keys: list[str], answers: list[str], context: Callable[[int], str]) -> Puzzle:
    asked = join_words(keys)
    if len(answers) == 1:
        task = "A magic number is hidden in the text below. Remember it: a question about it follows the text."
        return Puzzle(
            task, context, f"What is the magic number of {asked}?", f"The magic number of {asked} is", answers
        )
    task = "Magic numbers are hidden in the text below. Remember them: a question about them follows the text."
    question = f"What are all the magic numbers of {asked}?"
    return Puzzle(task, context, question, f"The magic numbers of {asked} are", answers)
