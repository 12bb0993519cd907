"""Critics, which write critiques of responses for the policy to refine its answer.

A critic takes the keyword arguments of a reward function and `correct`, one flag per response:

    def critic(prompts, completions, correct, **columns) -> list[str | None]

A response with critique None is not refined.
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
    """Critic with one fixed text for wrong responses and one for right responses.

    Args:
        wrong: critique of wrong responses.
        right: critique of right responses.
    """

    wrong: str = "The response is wrong."
    right: str = "The response is right."

    def __call__(self, correct: Sequence[bool], **columns: Any) -> list[str | None]:
        """Return a critique of each response."""
        return [self.right if one else self.wrong for one in correct]


@dataclass(frozen=True)
class GroundTruthCritic:
    """Critic that reveals the right answer from the dataset.

    Args:
        wrong, right: format strings for wrong and right responses; their fields are the dataset's columns and
            `{last_word}`, the prompt's last word, which can repeat a question at the end of a long prompt.

    Raises:
        ValueError: A text is not a valid format string or, when called, the dataset lacks a column.
    """

    wrong: str = "The response is wrong. The right answer is {answer}."
    right: str = "The response is right. The right answer is {answer}."

    def __post_init__(self) -> None:
        for name in ("wrong", "right"):
            fields_of(name, getattr(self, name))

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], correct: Sequence[bool], **columns: Any
    ) -> list[str | None]:
        """Return a critique of each response."""
        known = {**columns, "last_word": [prompt.split()[-1] for prompt in prompts]}
        for name in ("wrong", "right"):
            missing = fields_of(name, getattr(self, name)) - set(known)
            if missing:
                raise ValueError(
                    f"{name} has unknown fields {', '.join(sorted(missing))}; the available fields are "
                    f"{', '.join(known)}"
                )
        rows = [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]
        texts = [self.right if one else self.wrong for one in correct]
        return [text.format(**row) for text, row in zip(texts, rows, strict=True)]


class EndpointCritic:
    """Critic that queries a model at an OpenAI-compatible endpoint with concurrent requests, one per response.

    If a request fails or returns an empty critique, the critique is None, and `failures` is incremented.

    Args:
        url: the base URL, without /chat/completions.
        model: the name of the model at the endpoint.
        instruction: the task of the model; question, response and, if given, answer are appended.
        answer_column: the dataset's column with the right answer, which is shown to the model; None shows no answer.
        max_tokens: the maximum number of tokens in a critique.
        temperature: the sampling temperature of critiques.
        concurrency: the maximum number of concurrent requests.
        api_key_variable: the environment variable that contains the API key; None sends no key.
        timeout, retries, backoff, max_bytes: see Endpoint.

    Raises:
        ValueError: A setting is out of range, or the environment variable is not set.
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
            raise ValueError(
                f"api_key_variable={api_key_variable!r} names an environment variable that is not set; export it with "
                "the API key"
            )
        headers = None if key is None else {"Authorization": f"Bearer {key}"}
        self.endpoint = Endpoint(
            url=f"{url.rstrip('/')}/chat/completions",
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_bytes=max_bytes,
            headers=headers,
        )
        self.model, self.instruction, self.answer_column = model, instruction, answer_column
        self.max_tokens, self.temperature, self.concurrency = max_tokens, temperature, concurrency
        self.failures = 0

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[str | None]:
        """Return a critique of each response, or None for failed requests."""
        if self.answer_column is not None and self.answer_column not in columns:
            raise ValueError(
                f"answer_column={self.answer_column!r} is not a column of the dataset; set it to a column, or to null"
            )
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
    """Return the message text of a chat completion.

    Raises:
        ValueError: The answer is malformed, or its text is empty.
    """
    try:
        content = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the answer is not a chat completion: {str(answer)[:200]!r}") from error
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"the chat completion has no text: {str(answer)[:200]!r}")
    return content


def fields_of(name: str, template: str) -> set[str]:
    """Return the names of a format string's fields.

    Raises:
        ValueError: The template is not a valid format string, or a field is not an identifier.
    """
    try:
        found = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ValueError(
            f"{name}={template!r} is not a valid format string: {error}; escape braces as {{{{ or }}}}"
        ) from error
    if not all(field.isidentifier() for field in found):
        raise ValueError(f"{name}={template!r} may only contain named fields; escape braces as {{{{ or }}}}")
    return found
