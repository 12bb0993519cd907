"""Tool calls in both formats; errors of tools are reported and counted and never raise."""

import pytest

from hybridmem.rl.environments.tools import Call, CallError, act, parse_calls, tools_of


class Counter:
    """Counting environment with TRL's interface."""

    def __init__(self):
        self.count = 0

    def reset(self, **columns):
        self.count = 0

    def get_reward(self):
        return float(self.count)

    def add(self, number: int) -> str:
        self.count += number
        return f"now {self.count}"

    def name(self, first: str, second: str) -> str:
        return f"{first}|{second}"

    async def later(self) -> str:
        return "in the end"

    def fail(self) -> str:
        raise OSError("no such thing")

    def _hidden(self):
        pass


@pytest.fixture
def counter():
    return Counter()


def test_tools_are_the_public_methods(counter):
    assert set(tools_of(counter)) == {"add", "name", "later", "fail"}
    with pytest.raises(ValueError, match="Bare lacks a method reset"):
        tools_of(type("Bare", (), {})())
    with pytest.raises(ValueError, match="has no tool"):
        tools_of(type("Silent", (), {"reset": lambda self: None})())


@pytest.mark.parametrize(
    ("turn", "call_format", "calls"),
    [
        ("add 3", "plain", [Call("add", {"number": 3})]),
        ("name one two three", "plain", [Call("name", {"first": "one", "second": "two three"})]),
        ("later", "plain", [Call("later", {})]),
        ("  ", "plain", []),
        ("I am done.", "json", []),
        ('<tool_call>{"name": "add", "arguments": {"number": 3}}</tool_call>', "json", [Call("add", {"number": 3})]),
        (
            'so <tool_call>{"name": "later"}</tool_call>\n<tool_call>{"name": "add", "arguments": {"number": 1}}'
            "</tool_call>",
            "json",
            [Call("later", {}), Call("add", {"number": 1})],
        ),
    ],
)
def test_calls_are_read(counter, turn, call_format, calls):
    assert parse_calls(turn, tools_of(counter), call_format) == calls


@pytest.mark.parametrize(
    ("turn", "call_format", "message"),
    [
        ("subtract 3", "plain", "there is no tool 'subtract'; there are add, fail, later, name"),
        ("add three", "plain", "number='three' is no"),
        ("add", "plain", "missing a required argument: 'number'"),
        ("later now", "plain", "later takes no arguments"),
        ("<tool_call>add 3</tool_call>", "json", "a call is"),
        ("<tool_call>[1]</tool_call>", "json", "a call is"),
        ('<tool_call>{"name": "add", "arguments": {"n": 3}}</tool_call>', "json", "missing a required argument"),
        ('<tool_call>{"name": "reset"}</tool_call>', "json", "there is no tool 'reset'"),
        ('<tool_call>{"name": "_hidden"}</tool_call>', "json", "there is no tool '_hidden'"),
    ],
)
def test_invalid_calls_are_reported(counter, turn, call_format, message):
    with pytest.raises(CallError) as error:
        parse_calls(turn, tools_of(counter), call_format)
    assert message in str(error.value)
    step = act(counter, turn, call_format, 200)
    assert step.observation.startswith("error: ")
    assert (step.calls, step.failures, step.ended) == (1, 1, False)


def test_a_turn_acts(counter):
    assert act(counter, "add 2", "plain", 100).observation == "now 2"
    assert act(counter, "later", "plain", 100).observation == "in the end"
    failed = act(counter, "fail", "plain", 100)
    assert (failed.observation, failed.failures, failed.ended) == ("error: OSError: no such thing", 1, False)
    assert act(counter, "add 1", "plain", 4).observation == "now … (1 characters left out)"
    assert act(counter, "", "plain", 100).ended
    counter.done = True
    assert act(counter, "add 1", "plain", 100).ended
