"""JSON over HTTP that may be slow, broken or away: what retrievers and critics of other machines are asked through."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from hybridmem.checks import at_least

CHUNK = 1 << 16  # bytes that are read before the clock is looked at
BUSY = (408, 429)  # of the client's errors those that another try may not meet


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Answers of 3xx are refusals: following one would hand the headers, a key among them, to another host."""

    def redirect_request(self, *_: Any) -> None:
        """Do not ask elsewhere."""


OPENER = urllib.request.build_opener(NoRedirects)


class EndpointError(Exception):
    """An endpoint gave no usable answer, after all retries."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An address that takes JSON and gives JSON.

    Args:
        url: http:// or https://.
        timeout: seconds that one try may take in all.
        retries: tries after the first one. Refusals (HTTP 3xx, which are not followed, and 4xx but 408 and 429) are
            not tried again.
        backoff: seconds before the first retry; doubled before each further one.
        max_bytes: the longest answer that is read.
        headers: of the request, beside the content type.

    Raises:
        ValueError: a setting that cannot work.
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
        """What the endpoint answers to a body, both as JSON unless `parse` takes something else.

        Raises:
            EndpointError: no try gave JSON in time.
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
            except (OSError, ValueError, RecursionError, HTTPException) as error:  # away, slow, too long, or not JSON
                failure = error
        raise EndpointError(f"{self.url}: {type(failure).__name__}: {failure}") from failure

    def _ask(self, data: bytes) -> bytes:
        """One try. urllib's own timeout is for each wait, of which an answer that trickles in has many."""
        headers = {"Content-Type": "application/json", **(self.headers or {})}
        request = urllib.request.Request(self.url, data, headers)
        deadline = time.monotonic() + self.timeout
        answer = bytearray()
        with OPENER.open(request, timeout=self.timeout) as response:
            while part := response.read1(CHUNK):
                answer += part
                if len(answer) > self.max_bytes:
                    raise ValueError(f"the answer is longer than max_bytes={self.max_bytes}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the answer took longer than timeout={self.timeout} seconds")
        return bytes(answer)
