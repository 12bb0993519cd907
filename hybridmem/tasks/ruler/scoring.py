"""RULER's scores of a completion: the expected strings that it contains, ignoring case."""

from collections.abc import Sequence


def string_match_all(completion: str, expected: Sequence[str]) -> float:
    """Return the share of the expected strings that the completion contains."""
    return sum(_contains(completion, text) for text in expected) / len(expected)


def string_match_part(completion: str, expected: Sequence[str]) -> float:
    """Return 1 if the completion contains any of the expected strings, else 0."""
    return float(any(_contains(completion, text) for text in expected))


def _contains(completion: str, text: str) -> bool:
    return text.lower() in completion.lower()
