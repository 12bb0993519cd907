"""Tool calls in environments with TRL's interface, so that environments work with both libraries.

    class Shop:
        def reset(self, **columns) -> str | None:  # takes an example's columns; returned text follows the prompt
        def get_reward(self) -> float:             # optional; without it, reward functions score the trajectory
        def search(self, query: str) -> str:       # every other public method is a tool

A turn is the policy's output up to EOS. It contains tool calls, whose results the policy reads next. A turn without a
call ends the trajectory. So does, as an extension of TRL's interface, a true attribute `done` of the environment.

Calls have the format `json`, as in most chat templates, with any number of calls per turn, or `plain`, for models that
never saw JSON:

    <tool_call>{"name": "search", "arguments": {"query": "red shoes"}}</tool_call>
    search red shoes
"""

import asyncio
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CALL_FORMATS = ("plain", "json")
NOT_TOOLS = ("reset", "get_reward")
JSON_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
TYPES: dict[Any, Callable[[str], Any]] = {int: int, float: float, "int": int, "float": float}

Tools = dict[str, Callable[..., Any]]


class CallError(ValueError):
    """Error for an invalid tool call; its message becomes the policy's observation."""


@dataclass(frozen=True)
class Call:
    """Tool call: the tool's name and its arguments."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """Result of a turn.

    Args:
        observation: the text that the policy reads next.
        calls: the number of tool calls.
        failures: the number of calls that could not be parsed or raised an error.
        ended: True if the turn ended the trajectory.
    """

    observation: str
    calls: int
    failures: int
    ended: bool


def tools_of(environment: Any) -> Tools:
    """Return the tools of an environment by name: its public methods except `reset` and `get_reward`.

    Raises:
        ValueError: The environment has no method `reset`, or no tool.
    """
    members = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    tools = {name: getattr(environment, name) for name, _ in members if not name.startswith("_")}
    kind = type(environment).__name__
    if "reset" not in tools:
        raise ValueError(f"environment_factory: {kind} lacks a method reset(**columns), which starts an episode")
    tools = {name: tool for name, tool in tools.items() if name not in NOT_TOOLS}
    if not tools:
        raise ValueError(f"environment_factory: {kind} has no tools; add a public method besides reset and get_reward")
    return tools


def act(environment: Any, turn: str, call_format: str, max_observation_length: int) -> Step:
    """Execute a turn's tool calls. Errors of tools become observations, count as failures and never stop training.

    Args:
        environment: the environment.
        turn: the policy's output.
        call_format: `plain` or `json`.
        max_observation_length: the number of characters at which the observation is cut, with a note.
    """
    tools = tools_of(environment)
    try:
        calls = parse_calls(turn, tools, call_format)
    except CallError as error:
        return Step(_cut(f"error: {error}", max_observation_length), calls=1, failures=1, ended=False)
    said, failures = [], 0
    for call in calls:
        try:
            said.append(_called(tools[call.name], call.arguments))
        except Exception as error:
            failures += 1
            said.append(f"error: {type(error).__name__}: {error}")
    ended = not calls or bool(getattr(environment, "done", False))
    return Step(_cut("\n".join(said), max_observation_length), len(calls), failures, ended)


def parse_calls(turn: str, tools: Tools, call_format: str) -> list[Call]:
    """Parse the tool calls of a turn, of which there may be none.

    Raises:
        CallError: A call is malformed, or does not match a tool's signature.
    """
    written = JSON_CALL.findall(turn) if call_format == "json" else [turn.strip()] if turn.strip() else []
    parse = _parse_json if call_format == "json" else _parse_plain
    return [_checked(parse(text, tools), tools) for text in written]


def _parse_json(text: str, tools: Tools) -> Call:
    try:
        call = json.loads(text)
        return Call(str(call["name"]), dict(call.get("arguments") or {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CallError('a call is {"name": …, "arguments": {…}}') from error


def _parse_plain(text: str, tools: Tools) -> Call:
    """Parse a tool's name and its positional arguments; the last argument takes the rest of the text."""
    name, _, rest = text.partition(" ")
    if name not in tools:
        return Call(name, {})
    parameters = list(inspect.signature(tools[name]).parameters.values())
    given = rest.split(" ", len(parameters) - 1) if rest and parameters else [rest] if rest else []
    if len(given) > len(parameters):
        raise CallError(f"{name} takes no arguments")
    arguments = {}
    for parameter, value in zip(parameters, given, strict=False):
        try:
            arguments[parameter.name] = TYPES.get(parameter.annotation, str)(value)
        except ValueError as error:
            raise CallError(f"{name}: {parameter.name}={value!r} is not a valid {parameter.annotation}") from error
    return Call(name, arguments)


def _checked(call: Call, tools: Tools) -> Call:
    if call.name not in tools:
        raise CallError(f"there is no tool {call.name!r}; there are {', '.join(tools)}")
    try:
        inspect.signature(tools[call.name]).bind(**call.arguments)
    except TypeError as error:
        raise CallError(f"{call.name}: {error}") from error
    return call


def _called(tool: Callable[..., Any], arguments: dict[str, Any]) -> str:
    answer = tool(**arguments)
    return str(asyncio.run(answer) if inspect.iscoroutine(answer) else answer)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text) - length} characters left out)"
