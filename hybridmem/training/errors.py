"""Errors that the user can mend, in one line that names the setting."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

# What jsonargparse says around the sentence that matters.
NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Expected a path but|Problem with given class_path|Class validation error for validator"
)
KEY = re.compile(r'Parser key "([^"]+)":\s*')


class SettingsError(Exception):
    """Something that the user can mend, found before any long work."""


class StoppedError(Exception):
    """A run cannot go on, for a reason that one line tells."""


@contextmanager
def settings_errors() -> Iterator[None]:
    """Turn what the checks of settings and files raise into one line."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, StrictDataclassError, MisconfigurationException) as error:
        raise SettingsError(one_line(str(error))) from error


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
    if "are required" in text:
        text += " (give --config FILE)"
    return f"{'.'.join(names)}: {text}" if names else text


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
