"""JSON requests over HTTP with retries, total timeouts and size limits, for remote retrievers and critics."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from hybridmem.checks import at_least

CHUNK = 1 << 16  # bytes read between checks of the deadline
BUSY = (408, 429)  # client errors worth a retry


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Handler that treats 3xx as failures, because a redirect would send headers with API keys to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Return None, which makes urllib raise an HTTPError."""


OPENER = urllib.request.build_opener(NoRedirects)


class EndpointError(Exception):
    """Error for an endpoint that gave no usable answer after all retries."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """HTTP endpoint for JSON requests and JSON responses.

    Args:
        url: an http:// or https:// URL.
        timeout: the total seconds allowed for one attempt.
        retries: the number of attempts after the first. HTTP 3xx (redirects are not followed) and 4xx except 408 and
            429 are not retried.
        backoff: seconds before the first retry, doubled before each further retry.
        max_bytes: the maximum size of a response.
        headers: request headers in addition to the content type.

    Raises:
        ValueError: A setting is out of range.
    """

    url: str
    timeout: float = 10.0
    retries: int = 3
    backoff: float = 0.5
    max_bytes: int = 1 << 22
    headers: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r} must begin with http:// or https://")
        if not self.timeout > 0 or self.backoff < 0:
            raise ValueError(f"timeout={self.timeout} must be above 0 and backoff={self.backoff} at least 0 seconds")
        at_least(0, retries=self.retries)
        at_least(1, max_bytes=self.max_bytes)

    def post(self, body: Any, parse: Callable[[bytes], Any] = json.loads) -> Any:
        """Send a body as JSON and return the response, which `parse` decodes from bytes.

        Raises:
            EndpointError: No attempt succeeded in time.
        """
        data = json.dumps(body).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return parse(self._ask(data))
            except urllib.error.HTTPError as error:
                error.close()
                failure: Exception = error
                if error.code < 500 and error.code not in BUSY:
                    break
            except (
                OSError,
                ValueError,
                RecursionError,
                HTTPException,
            ) as error:  # unreachable, slow, too long, or not JSON
                failure = error
        raise EndpointError(f"{self.url}: {type(failure).__name__}: {failure}") from failure

    def _ask(self, data: bytes) -> bytes:
        """Make one attempt with a total deadline; urllib's own timeout restarts with every chunk that arrives."""
        headers = {"Content-Type": "application/json", **(self.headers or {})}
        request = urllib.request.Request(self.url, data, headers)
        deadline = time.monotonic() + self.timeout
        answer = bytearray()
        with OPENER.open(request, timeout=self.timeout) as response:
            while part := response.read1(CHUNK):
                answer += part
                if len(answer) > self.max_bytes:
                    raise ValueError(f"the response exceeds max_bytes={self.max_bytes}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the response took longer than timeout={self.timeout} seconds")
        return bytes(answer)
