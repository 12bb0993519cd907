"""Parsers of the command line, whose errors are one line that names the setting."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

from huggingface_hub.errors import StrictDataclassError
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from hybridmem.tasks.task import flaw_of_class
from hybridmem.training.errors import SettingsError

# Lines that jsonargparse adds around the sentence that matters.
NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Expected a path but|Problem with given class_path|Class validation error for validator"
)
NOT_A_TASK = re.compile(r"Import path (\S+) does not implement protocol Task")
KEY = re.compile(r'Parser key "([^"]+)":\s*')


@contextmanager
def settings_errors() -> Iterator[None]:
    """Turn what the checks of settings and files raise into one line."""
    try:
        yield
    except BrokenPipeError:  # no setting's fault: nobody reads on
        raise
    except (ValueError, TypeError, OSError, ImportError, StrictDataclassError, MisconfigurationException) as error:
        raise SettingsError(one_line(str(error))) from error


def refuse_nulls(settings: Any, place: str = "") -> None:
    """Refuse a null for a setting that takes none, in every class that is named: there the parser lets it through.

    Raises:
        ValueError: with the setting's name and type.
    """
    if isinstance(settings, list):
        for number, each in enumerate(settings):
            refuse_nulls(each, f"{place}.{number}")
    if not isinstance(settings, Namespace | dict):
        return
    for name, value in vars(settings).items() if isinstance(settings, Namespace) else settings.items():
        refuse_nulls(value, f"{place}.{name}".removeprefix("."))
    given = settings.get("init_args")
    if isinstance(given, Namespace | dict) and isinstance(settings.get("class_path"), str):
        refuse_null_arguments(given, resolve_name(settings["class_path"]), f"{place}.init_args")


def refuse_null_arguments(given: Namespace | dict[str, Any], of: Any, place: str) -> None:
    """The same for the arguments of one class or function.

    Raises:
        ValueError: with the setting's name and type.
    """
    for name, kind in _types_without_null(of).items():
        if name in given and given[name] is None:
            raise ValueError(f"{place}.{name} is {getattr(kind, '__name__', kind)} and cannot be null")


def _types_without_null(of: Any) -> dict[str, Any]:
    """The parameters of a class or function that say their type, and that None is not of it."""
    function = getattr(of, "__init__") if isinstance(of, type) else of  # noqa: B009
    try:
        types, parameters = get_type_hints(function), inspect.signature(function).parameters
    except (NameError, TypeError, ValueError):  # types that exist for a checker only; built-in functions
        return {}
    return {
        name: kind
        for name, kind in types.items()
        if name in parameters
        and parameters[name].default is not None
        and not any(part in (Any, None, NoneType) for part in (kind, *get_args(kind)))
    }


def one_line(message: str) -> str:
    """The setting's dotted name and what is wrong with it, out of a nested message of several lines."""
    names: list[str] = []
    sentences: list[str] = []
    for line in message.splitlines():
        names += KEY.findall(line)
        sentence = KEY.sub("", line).strip().removeprefix("- ").removeprefix("ValueError: ")
        if sentence and not NOISE.match(sentence) and sentence not in sentences:
            sentences.append(sentence)
    text = "; ".join(sentences) or " ".join(message.split())
    text = NOT_A_TASK.sub(_flaw_of_task, text)
    if "are required" in text:
        text += " (give --config FILE)"
    return f"{'.'.join(names)}: {text}" if names else text


def _flaw_of_task(found: re.Match[str]) -> str:
    """Return which member of Task the class lacks that the parser has refused."""
    return flaw_of_class(resolve_name(found[1]))


class _OneLineErrors(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a SettingsError instead of printing every option there is."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise SettingsError(one_line(message)) from ex


class CommandParser(_OneLineErrors):
    """For our own commands."""


class TrainingParser(_OneLineErrors, LightningArgumentParser):
    """For Lightning's commands."""
