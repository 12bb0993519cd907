"""Endpoints that are down or slow, refuse requests or return garbage."""

import time

import pytest

from hybridmem.rl.rewards.http import Endpoint, EndpointError
from tests.hybridmem.rl.servers import as_json, serving


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_answers_and_headers():
    with serving(lambda body, _: as_json({"got": body})) as (url, requests):
        assert Endpoint(url=url, headers={"X-Key": "k"}).post([1, "ü"]) == {"got": [1, "ü"]}
    assert requests[0]["headers"]["X-Key"] == "k"
    assert requests[0]["headers"]["Content-Type"] == "application/json"


RUBBISH = (b"<html>", b"\xff", b"[" * 50_000, b'"' + b"1" * 100_000 + b'"')


@pytest.mark.parametrize("bad", [(500, b"{}"), (429, b"{}"), *((200, rubbish) for rubbish in RUBBISH)])
def test_tries_again(bad):
    with serving(lambda _, number: bad if number < 3 else as_json("well")) as (url, requests):
        assert Endpoint(url=url, retries=2, backoff=0.0, max_bytes=60_000).post({}) == "well"
        assert len(requests) == 3


def test_waits_longer_before_each_try(monkeypatch):
    waits = []
    monkeypatch.setattr("hybridmem.rl.rewards.http.time.sleep", waits.append)
    with serving(lambda *_: (503, b"")) as (url, requests), pytest.raises(EndpointError, match="503"):
        Endpoint(url=url, retries=3, backoff=0.5).post({})
    assert waits == [0.5, 1.0, 2.0]
    assert len(requests) == 4


def test_a_refusal_is_final():
    with serving(lambda *_: (403, b"")) as (url, requests), pytest.raises(EndpointError, match="403"):
        Endpoint(url=url, retries=5, backoff=0.0).post({})
    assert len(requests) == 1


def test_a_redirect_is_not_followed():
    """The API key in the headers must not reach another host."""
    with (
        serving(lambda *_: as_json("taken")) as (elsewhere, stolen),
        serving(lambda *_: (302, b""), headers={"Location": elsewhere}) as (url, requests),
        pytest.raises(EndpointError, match="302"),
    ):
        Endpoint(url=url, retries=2, backoff=0.0, headers={"Authorization": "Bearer key"}).post({})
    assert len(requests) == 1
    assert not stolen


def test_an_answer_that_trickles_in_is_given_up():
    """Each wait is short, but their sum exceeds the timeout."""

    def trickle():
        for _ in range(100):
            time.sleep(0.02)
            yield b" "

    with serving(lambda *_: (200, trickle())) as (url, _), pytest.raises(EndpointError, match=r"timeout=0\.2"):
        Endpoint(url=url, timeout=0.2, retries=0).post({})


def test_too_slow_and_too_long():
    def slow(*_):
        time.sleep(0.5)
        return as_json("late")

    with serving(slow) as (url, _), pytest.raises(EndpointError, match="time"):
        Endpoint(url=url, timeout=0.05, retries=0).post({})
    with serving(lambda *_: as_json("x" * 1000)) as (url, _), pytest.raises(EndpointError, match="max_bytes=100"):
        Endpoint(url=url, max_bytes=100, retries=0).post({})


def test_nobody_listens():
    with serving(lambda *_: as_json(1)) as (url, _):
        pass
    with pytest.raises(EndpointError, match=url):
        Endpoint(url=url, retries=1, backoff=0.0, timeout=1.0).post({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "file:///etc/hosts"}, "must begin with http"),
        ({"timeout": 0.0}, "timeout=0.0"),
        ({"backoff": -1.0}, "backoff=-1.0"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"url": "http://127.0.0.1", **settings})
