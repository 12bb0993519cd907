"""Errors that users can act on, each in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException


class SettingsError(Exception):
    """A setting or file that the user can correct, found before any long work."""


class StoppedError(Exception):
    """A reason, in one line, why a run cannot continue."""


@contextmanager
def named(setting: str) -> Iterator[None]:
    """Prefix the errors of a class with the name of the setting that chose it."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError, MisconfigurationException) as error:
        raise ValueError(f"{setting}: {error}") from error
