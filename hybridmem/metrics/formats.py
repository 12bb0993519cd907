"""Shares of the surface formats of answers, and the accuracy of each format (after arXiv 2504.07912)."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .entropy import entropy
from .float64 import Float64Metric

OTHER = "other"  # texts in none of the formats
Classifier = Callable[[str], str | None]
Formats = Mapping[str, str] | Classifier


class FormatShare(Float64Metric):
    """Share of each format among texts, entropy of the shares in nats, and accuracy of each format.

    Args:
        formats: regular expressions by format name, of which the first one found in the text counts; or a function
            from a text to a format name, or to None for texts in no format.
        names: the format names that such a function returns.

    Raises:
        ValueError: an expression is invalid, or names are missing, repeated or "other"; in `update`, the function
            returns an unknown name.
    """

    full_state_update = False
    texts: Tensor
    judged: Tensor
    right: Tensor

    def __init__(self, formats: Formats, names: Sequence[str] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.names = [*_names(formats, names), OTHER]
        self.classify = formats if callable(formats) else partial(_first_match, _compiled(formats))
        for state in ("texts", "judged", "right"):
            self.add_state(state, torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str], right: Sequence[bool] | None = None) -> None:
        """Add texts and, if known, the correctness of each text."""
        if right is not None and len(right) != len(texts):
            raise ValueError(f"right has {len(right)} values for {len(texts)} texts: give one for each")
        for number, text in enumerate(texts):
            place = self._place(text)
            self.texts[place] += 1
            if right is not None:
                self.judged[place] += 1
                self.right[place] += bool(right[number])

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Return `share/NAME` of every format and of `other`, `entropy`, and `accuracy/NAME` of formats.

        Shares and entropy are NaN before the first text. Formats without texts of known correctness have no accuracy.
        """
        shares = self.texts / self.texts.sum()
        values = {f"share/{name}": share for name, share in zip(self.names, shares, strict=True)}
        values["entropy"] = entropy(shares)
        for name, right, judged in zip(self.names, self.right, self.judged, strict=True):
            if judged > 0:
                values[f"accuracy/{name}"] = right / judged
        return values

    def _place(self, text: str) -> int:
        name = self.classify(text)
        if name is None:
            return len(self.names) - 1
        if name not in self.names:
            raise ValueError(f"formats returned {name!r}, which is not in names={self.names[:-1]}: add it to names")
        return self.names.index(name)


def _names(formats: Formats, names: Sequence[str] | None) -> list[str]:
    if callable(formats) == (names is None):
        raise ValueError("names requires formats to be a function: give both, or only regular expressions by name")
    found = list(formats) if names is None else list(names)  # type: ignore[arg-type] # a mapping if names is None
    if not found or len({*found, OTHER}) <= len(found):
        raise ValueError(f"names of formats must differ and not be {OTHER!r}, which is reserved: {found}")
    return found


def _compiled(formats: Mapping[str, str]) -> dict[str, re.Pattern[str]]:
    patterns = {}
    for name, pattern in formats.items():
        try:
            patterns[name] = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"formats: {name}={pattern!r} is not a regular expression: {error}") from error
    return patterns


def _first_match(patterns: Mapping[str, re.Pattern[str]], text: str) -> str | None:
    return next((name for name, pattern in patterns.items() if pattern.search(text)), None)
