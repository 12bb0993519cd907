"""Word counts: the most common words of a list, and the most frequent ones of a coded text."""

from string import ascii_lowercase

import numpy as np

from .puzzle import Material, Puzzle

NUM_COMMON, WORDS_ASKED = 10, 3  # words that an answer names
ENTRY = 13  # characters of a typical entry of the list
CODED_LENGTH = 6
FEWEST_CODED = 64  # words of the shortest coded text whose three most frequent words differ in frequency
ALPHA = 2.0  # exponent of the zeta distribution
NOISE = "..."


def common_words(material: Material, rng: np.random.Generator, times: int, times_others: int) -> Puzzle:
    """List ten common words `times` times each, among words that occur `times_others` times; ask for the common ones.

    If the list needs more words than there are, common and other words repeat equally often, so that the ratio remains.
    """
    words = [material.words[n] for n in rng.permutation(len(material.words))]
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    every = np.array(common * times + [word for word in others for _ in range(times_others)])
    shortest, seed = NUM_COMMON * times, int(rng.integers(2**63))

    def context(size: int) -> str:
        own = np.random.default_rng(seed)
        count = shortest + size // ENTRY
        listed = every[:count] if count <= len(every) else np.resize(own.permutation(every), count)
        return " ".join(f"{n}. {word}" for n, word in enumerate(own.permutation(listed), start=1))

    return Puzzle(
        task="Some words of the numbered list below occur more often than others. Remember the most common ones.",
        context=context,
        question=f"What are the {NUM_COMMON} most common words of the list?",
        beginning=f"The {NUM_COMMON} most common words of the list are",
        answers=common,
    )


def frequent_words(rng: np.random.Generator, num_tokens: int) -> Puzzle:
    """Write a text of coded words with zeta-distributed frequencies; ask for the three most frequent ones.

    Dots take the first place of the distribution. There is a word for every 50 of `num_tokens`.
    """
    words: dict[str, None] = {NOISE: None}
    while len(words) < max(num_tokens // 50, 2 * WORDS_ASKED):
        words["".join(ascii_lowercase[n] for n in rng.integers(26, size=CODED_LENGTH))] = None
    coded = np.array(list(words))
    shares = np.arange(1, len(coded) + 1) ** -ALPHA
    shares /= shares.sum()
    seed = int(rng.integers(2**63))

    def context(size: int) -> str:
        count = FEWEST_CODED + size // (CODED_LENGTH + 1)
        drawn = np.repeat(coded, (count * shares).astype(int))
        return " ".join(np.random.default_rng(seed).permutation(drawn))

    return Puzzle(
        task="Keep track of how often each word of the coded text below occurs. Ignore the dots.",
        context=context,
        question=f"What are the {WORDS_ASKED} most frequent words of the coded text?",
        beginning=f"The {WORDS_ASKED} most frequent words of the coded text are",
        answers=coded[1 : WORDS_ASKED + 1].tolist(),
    )
