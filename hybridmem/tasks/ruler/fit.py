"""A prompt of an exact number of tokens, from a context of any size and a filling cut to a character.

The secant method finds the size of the context, since the number of tokens grows almost linearly with it. Then
bisection cuts the filling, which tokenises only the text near it. A prompt of any length is thus tokenised
only a few times.
"""

from collections.abc import Callable

Count = Callable[[str], int]
Parts = Callable[[int], tuple[str, str]]  # the texts before and after the filling, by the context's size in characters

MOST_FILLED, AIM = 128, 16  # tokens of the filling: at most, and as aimed for
ROUNDS = 24
NEAR = 300  # characters after the filling that can change how it is tokenised
STEPS = 12  # characters around the place that bisection finds


class TooShortError(ValueError):
    """Error for a prompt that needs at least `least` tokens."""

    def __init__(self, least: int):
        super().__init__(f"the shortest prompt has {least} tokens")
        self.least = least


class NoCutError(ValueError):
    """Error for a filling that cannot be cut to the number of tokens."""


def fit(parts: Parts, filling: str, num_tokens: int, count: Count) -> str:
    """Return before + filling + after with exactly `num_tokens` tokens; the filling is cut after some character.

    Raises:
        TooShortError: the prompt with the shortest context has more tokens.
        NoCutError: no cut gives the number of tokens.
    """
    before, after = fit_context(parts, filling, num_tokens, count)
    for skipped in range(0, len(filling) // 2, STEPS + 1):
        text = fit_filling(before, filling[skipped:], after, num_tokens, count)
        if text is not None:
            return text
    raise NoCutError


def fit_context(parts: Parts, filling: str, num_tokens: int, count: Count) -> tuple[str, str]:
    """Return the texts around a filling of 1 to MOST_FILLED tokens."""
    least = count("".join(parts(0)))
    if least >= num_tokens:
        raise TooShortError(least + 1)
    room, per_token = num_tokens - AIM - least, len(filling) / count(filling)
    size = round(max(room, 0) * per_token)
    for _ in range(ROUNDS):
        before, after = parts(size)
        used = count(before + after)
        if 1 <= num_tokens - used <= MOST_FILLED:
            return before, after
        if used > least:
            per_token = size / (used - least)
        size = max(0, size + round((num_tokens - AIM - used) * per_token))
    raise NoCutError


def fit_filling(before: str, filling: str, after: str, num_tokens: int, count: Count) -> str | None:
    """Return the text with its filling cut to fit, or None if no cut fits."""
    near, length = after[:NEAR], 1

    def locally(length: int) -> int:
        return count(before + filling[:length] + near)

    for _ in range(ROUNDS):
        text = before + filling[:length] + after
        missing = num_tokens - count(text)
        if missing == 0:
            return text
        found = cut(locally, locally(length) + missing, len(filling))
        if found is None or found == length:
            return None
        length = found
    return None


def cut(measure: Callable[[int], int], target: int, most: int) -> int | None:
    """Return a length from 1 to `most` with measure(length) == target, for a measure that grows almost everywhere."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(middle) >= target else (middle + 1, high)
    candidates = sorted(range(max(1, low - STEPS), min(most, low + STEPS) + 1), key=lambda n: abs(n - low))
    return next((n for n in candidates if measure(n) == target), None)
