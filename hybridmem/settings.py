"""Checks of settings that tasks and data make alike."""

from collections.abc import Sequence


def at_least(least: int, **settings: int | None) -> None:
    """Refuse settings below `least`; None is no setting."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")


def one_of(choices: Sequence[str], **settings: str) -> None:
    """Refuse settings that are none of the choices."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
