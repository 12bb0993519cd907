"""One-line errors that users can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException


class SettingsError(Exception):
    """An error in a setting or file, raised before any long computation."""


class StoppedError(Exception):
    """A one-line error that ends a run which cannot continue."""


@contextmanager
def named(setting: str) -> Iterator[None]:
    """Prefix errors with the name of the setting that caused them."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OSError, MisconfigurationException) as error:
        raise ValueError(f"{setting}: {error}") from error


@contextmanager
def stopping_at(kind: type[Exception]) -> Iterator[None]:
    """Raise exceptions of a class as a StoppedError with the same message."""
    try:
        yield
    except kind as error:
        raise StoppedError(str(error)) from error
