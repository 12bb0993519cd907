"""Checks of settings, shared by tasks and data."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MOST_ROWS = 2**20  # per batch
MOST_WORKERS = 1024  # data loading processes


def at_least(least: int, most: int = sys.maxsize, **settings: int | None) -> None:
    """Raise a ValueError for settings below `least` or above `most`; None means unset and always passes."""
    for name, value in settings.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
        if value is not None and value > most:
            raise ValueError(f"{name} must be at most {most}, not {value}")


def between_0_and_1(**settings: float) -> None:
    """Raise a ValueError for shares outside the open interval (0, 1)."""
    for name, value in settings.items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, not be {value}")


def number_held_out(val_fraction: float, total: int, things: str, remedy: str = "give more of them") -> int:
    """Return the number of validation items among `total`: the fraction, but at least one, and not all.

    `things` and `remedy` are inserted into the error message.

    Raises:
        ValueError: there are fewer than two items.
    """
    if total < 2:
        raise ValueError(
            f"val_fraction={val_fraction} holds out at least one of two or more {things}, but there is {total}: "
            f"{remedy}"
        )
    return min(max(round(total * val_fraction), 1), total - 1)


def one_of(choices: Sequence[str], **settings: str) -> None:
    """Raise a ValueError for settings that are not among the choices."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def refuse_adapter(folder: str | Path, name: str | None = None) -> None:
    """Raise a ValueError for a folder with a PEFT adapter instead of a model; the error calls it `name`."""
    description = Path(folder, "adapter_config.json")
    if not description.is_file() or Path(folder, "config.json").is_file():
        return
    base = None
    with suppress(ValueError, AttributeError):  # not JSON, or not an object
        base = json.loads(description.read_bytes()).get("base_model_name_or_path")
    name = name or str(folder)
    raise ValueError(
        f"{name!r} is a PEFT adapter{f' of {base!r}' if base else ''}, not a model: merge it into its base model "
        f"(peft.AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER)) and "
        "give FOLDER, or give the base model and train a new adapter with lora"
    )
