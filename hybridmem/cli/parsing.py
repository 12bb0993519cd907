"""Command-line parsers with one-line errors that name the setting."""

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

# Errors from checks of settings and files.
SETTINGS_ERRORS = (ValueError, TypeError, OSError, ImportError, StrictDataclassError, MisconfigurationException)
# Lines that jsonargparse adds around the actual error.
NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Expected a path but|Problem with given class_path|Class validation error for validator"
    r"|Import path \S+ does not correspond to a subclass of HybridMemConfig"
)
# PretrainModule's config is a HybridMemConfig, or the class_path of another configuration. The settings of a
# HybridMemConfig without a class_path are no PreTrainedConfig.
OTHER_CONFIG = re.compile(r"- Problem with given class_path 'transformers\.PreTrainedConfig':\n.*")
NOT_A_TASK = re.compile(r"Import path (\S+) does not implement protocol Task")
REQUIRED = re.compile(r"the following arguments are required: (.*)")
SUBCOMMAND = re.compile(r"^(fit|validate|test|predict)\.")
TYPE = re.compile(r"<class\s+'(?:\w+\.)*(\w+)'>")  # a type's repr in messages and, broken into lines, in help
KEY = re.compile(r'Parser key "([^"]+)":\s*')


@contextmanager
def settings_errors() -> Iterator[None]:
    """Convert errors from checks of settings and files into one-line SettingsErrors."""
    try:
        yield
    except BrokenPipeError:  # the reader of a pipe is gone; not an error in settings
        raise
    except SETTINGS_ERRORS as error:
        raise SettingsError(one_line(str(error))) from error


def refuse_nulls(settings: Any, place: str = "") -> None:
    """Check the arguments of every class in the settings for invalid nulls, which the parser accepts.

    Raises:
        ValueError: a setting is null although its type does not allow it.
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
    """Check the arguments of one class or function for invalid nulls.

    Raises:
        ValueError: an argument is null although its type does not allow it.
    """
    for name, kind in _types_without_null(of).items():
        if name in given and given[name] is None:
            raise ValueError(f"{place}.{name}=null must be of type {getattr(kind, '__name__', kind)}")


def _types_without_null(of: Any) -> dict[str, Any]:
    """Return the annotated parameters of a class or function whose type excludes None."""
    function = getattr(of, "__init__") if isinstance(of, type) else of  # noqa: B009
    try:
        types, parameters = get_type_hints(function), inspect.signature(function).parameters
    except (NameError, TypeError, ValueError):  # types for type checkers only; built-in functions
        return {}
    return {
        name: kind
        for name, kind in types.items()
        if name in parameters
        and parameters[name].default is not None
        and not any(part in (Any, None, NoneType) for part in (kind, *get_args(kind)))
    }


def one_line(message: str) -> str:
    """Reduce a nested message of several lines to the setting's dotted name and the error."""
    names: list[str] = []
    sentences: list[str] = []
    for line in OTHER_CONFIG.sub("", message).splitlines():
        names += KEY.findall(line)
        sentence = KEY.sub("", line).strip().removeprefix("- ").removeprefix("ValueError: ")
        if sentence and not NOISE.match(sentence) and sentence not in sentences:
            sentences.append(sentence)
    text = "; ".join(sentences) or " ".join(message.split())
    text = TYPE.sub(r"\1", NOT_A_TASK.sub(_flaw_of_task, REQUIRED.sub(_required_options, text)))
    return f"{'.'.join(names)}: {text}" if names else text


def _required_options(found: re.Match[str]) -> str:
    """Name required options as a user writes them."""
    options = [f"--{SUBCOMMAND.sub('', name)}" for name in found[1].split(", ")]
    return f"{', '.join(options)} {'is' if len(options) == 1 else 'are'} required (or --config FILE with the settings)"


def _flaw_of_task(found: re.Match[str]) -> str:
    """Describe the member of Task that a rejected class lacks."""
    return flaw_of_class(resolve_name(found[1]))


class _OneLineErrors(ArgumentParser):
    def format_help(self) -> str:
        """Return the help with the names of types."""
        return TYPE.sub(r"\1", super().format_help())

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a SettingsError instead of printing all options."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise SettingsError(one_line(message)) from ex


class CommandParser(_OneLineErrors):
    """Parser of hybridmem's own commands."""


class TrainingParser(_OneLineErrors, LightningArgumentParser):
    """Parser of Lightning's commands."""
