"""Critics: what is wrong with a response, in words, for the policy to answer once more.

A critic is called with keywords, as reward functions are, and with `correct`, whether each response is right:

    def critic(prompts, completions, correct, **columns) -> list[str | None]

None is no critique: the response is not refined.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from string import Formatter
from typing import Any

from hybridmem.checks import at_least

from .http import Endpoint, EndpointError

Critic = Callable[..., list[str | None]]

INSTRUCTION = (
    "Check the response step by step. Say which step goes wrong first and why, without writing the whole solution anew."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndicativeCritic:
    """Says whether a response is right, and no more.

    Args:
        wrong, right: what is said of responses that are wrong, and of those that are right.
    """

    wrong: str = "The response is wrong."
    right: str = "The response is right."

    def __call__(self, correct: Sequence[bool], **columns: Any) -> list[str | None]:
        """A critique of each response."""
        return [self.right if one else self.wrong for one in correct]


@dataclass(frozen=True)
class GroundTruthCritic:
    """Says whether a response is right, and what the dataset says would be.

    Args:
        wrong, right: what is said, with the dataset's columns in braces. `{last_word}` is the prompt's last word, with
            which a question at the end of a long text can be asked again.

    Raises:
        ValueError: text that is no format string; when called, a column that the dataset lacks.
    """

    wrong: str = "The response is wrong. The right answer is {answer}."
    right: str = "The response is right. The right answer is {answer}."

    def __post_init__(self) -> None:
        for name in ("wrong", "right"):
            fields_of(name, getattr(self, name))

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], correct: Sequence[bool], **columns: Any
    ) -> list[str | None]:
        """A critique of each response."""
        known = {**columns, "last_word": [prompt.split()[-1] for prompt in prompts]}
        for name in ("wrong", "right"):
            missing = fields_of(name, getattr(self, name)) - set(known)
            if missing:
                raise ValueError(f"{name} names {', '.join(sorted(missing))}: the dataset has {', '.join(known)}")
        rows = [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]
        texts = [self.right if one else self.wrong for one in correct]
        return [text.format(**row) for text, row in zip(texts, rows, strict=True)]


class EndpointCritic:
    """Asks a model behind an OpenAI-compatible endpoint, response by response, several at a time.

    A response whose critique does not come, or comes empty, has none; it is counted in `failures`.

    Args:
        url: up to and without /chat/completions.
        model: the name of the model there.
        instruction: what the model is to do; question, response and, where there is one, answer follow.
        answer_column: the dataset's column with the right answer, which the model is told; None: it is not told.
        max_tokens: of a critique.
        temperature: of its sampling.
        concurrency: responses that are asked about at the same time.
        api_key_variable: the environment variable that holds the key; None: no key is sent.
        timeout, retries, backoff, max_bytes: see Endpoint.

    Raises:
        ValueError: a setting that cannot work, or an environment variable that is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        instruction: str = INSTRUCTION,
        answer_column: str | None = "answer",
        max_tokens: int = 512,
        temperature: float = 0.0,
        concurrency: int = 8,
        api_key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        max_bytes: int = 1 << 20,
    ):
        at_least(1, max_tokens=max_tokens, concurrency=concurrency)
        key = None if api_key_variable is None else os.environ.get(api_key_variable)
        if api_key_variable is not None and not key:
            raise ValueError(f"api_key_variable={api_key_variable!r} is not set in the environment")
        headers = None if key is None else {"Authorization": f"Bearer {key}"}
        self.endpoint = Endpoint(
            url=f"{url.rstrip('/')}/chat/completions", timeout=timeout, retries=retries, backoff=backoff,
            max_bytes=max_bytes, headers=headers,
        )  # fmt: skip
        self.model, self.instruction, self.answer_column = model, instruction, answer_column
        self.max_tokens, self.temperature, self.concurrency = max_tokens, temperature, concurrency
        self.failures = 0

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[str | None]:
        """A critique of each response, None where it did not come."""
        if self.answer_column is not None and self.answer_column not in columns:
            raise ValueError(f"answer_column={self.answer_column!r} is no column of the dataset: set it to null")
        answers = [None] * len(prompts) if self.answer_column is None else columns[self.answer_column]
        with ThreadPoolExecutor(self.concurrency) as pool:
            critiques = list(pool.map(self._ask, prompts, completions, answers))
        self.failures += critiques.count(None)
        return critiques

    def _ask(self, prompt: str, completion: str, answer: Any) -> str | None:
        told = "" if answer is None else f"\n\nRight answer:\n{answer}"
        question = f"{self.instruction}\n\nQuestion:\n{prompt}\n\nResponse:\n{completion}{told}"
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        try:
            return _content(self.endpoint.post(body))
        except (EndpointError, ValueError) as error:
            logger.warning("critic failed: %s", error)
            return None


def _content(answer: Any) -> str:
    """The message of a chat completion.

    Raises:
        ValueError: there is none.
    """
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no chat completion but {str(answer)[:200]!r}") from error
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"a chat completion without text: {str(answer)[:200]!r}")
    return content


def fields_of(name: str, template: str) -> set[str]:
    """What stands in braces in a format string.

    Raises:
        ValueError: it is none, or one with places that have no name.
    """
    try:
        found = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ValueError(f"{name}={template!r} is no format string: {error}; write a brace as {{{{ or }}}}") from error
    if not all(field.isidentifier() for field in found):
        raise ValueError(f"{name}={template!r} may only have names in braces; write a brace itself as {{{{ or }}}}")
    return found
