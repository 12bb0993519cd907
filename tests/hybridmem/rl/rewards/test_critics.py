"""Critics, and endpoints that fail to answer."""

import logging

import pytest

from hybridmem.rl import EndpointCritic, GroundTruthCritic, IndicativeCritic
from tests.hybridmem.rl.servers import as_json, serving

ASKED = dict(prompts=["one ?a=", "two ?b="], completions=["x", "y"], correct=[False, True], answer=["1", "2"])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def message(text):
    return as_json({"choices": [{"message": {"content": text}}]})


def test_indicative():
    assert IndicativeCritic(wrong="no", right="yes")(**ASKED) == ["no", "yes"]


def test_ground_truth():
    assert GroundTruthCritic(wrong="{answer} {last_word}")(**ASKED) == [
        "1 ?a=",
        "The response is right. The right answer is 2.",
    ]
    with pytest.raises(ValueError, match="wrong has unknown fields label"):
        GroundTruthCritic(wrong="{label}")(**ASKED)


@pytest.mark.parametrize("wrong", ["{", "{}", "{answer.x}", "{0}"])
def test_text_that_is_no_template(wrong):
    with pytest.raises(ValueError, match="wrong="):
        GroundTruthCritic(wrong=wrong)


def test_endpoint(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    with serving(lambda body, _: message(body["messages"][0]["content"][-1])) as (url, requests):
        critic = EndpointCritic(f"{url}/v1/", "judge", api_key_variable="SOME_KEY", concurrency=1, max_tokens=9)
        assert critic(**ASKED) == ["1", "2"]
    first = requests[0]
    assert first["path"] == "/v1/chat/completions"
    assert first["headers"]["Authorization"] == "Bearer secret"
    assert first["body"]["model"] == "judge"
    assert first["body"]["max_tokens"] == 9
    content = first["body"]["messages"][0]["content"]
    assert all(part in content for part in ("one ?a=", "\nx\n", "Right answer:\n1"))
    with serving(lambda body, _: message(body["messages"][0]["content"])) as (url, _):
        assert "Right answer" not in EndpointCritic(url, "judge", answer_column=None)(**ASKED)[0]


@pytest.mark.parametrize("rubbish", [{}, [], {"choices": []}, {"choices": [{"message": {"content": " "}}]}, "no"])
def test_rubbish_is_no_critique(rubbish, caplog):
    def answer(body, _):
        return as_json(rubbish) if "one" in body["messages"][0]["content"] else message("well")

    with serving(answer) as (url, _), caplog.at_level(logging.WARNING):
        critic = EndpointCritic(url, "judge", retries=0)
        assert critic(**ASKED) == [None, "well"]
    assert critic.failures == 1
    assert "critic failed" in caplog.text


def test_settings_that_cannot_work(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        EndpointCritic("http://127.0.0.1", "judge", api_key_variable="NO_SUCH_KEY")
    with pytest.raises(ValueError, match="concurrency must be at least 1"):
        EndpointCritic("http://127.0.0.1", "judge", concurrency=0)
    with pytest.raises(ValueError, match="answer_column='answer'"):
        EndpointCritic("http://127.0.0.1", "judge")(prompts=["p"], completions=["c"])
