"""Models and checkpoints that a run starts from, and the commands that create missing ones."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from .durable import newest_good

OF_MODULES = ("model", "base", "init_from")
OF_OBJECTIVES = ("teacher", "init_from")
CONFIGS = "configs"


def check_starting_points(module: Any, data: Any, root: str | Path, configs: Sequence[str | Path]) -> None:
    """Check that every local model and checkpoint that a run starts from exists.

    Args:
        module: settings of the Lightning module, with `init_args`.
        data: settings of the data module.
        root: the run's output folder; names in its topmost folder are paths rather than names on the hub.
        configs: the run's configuration files; their neighbours may create missing checkpoints.

    Raises:
        FileNotFoundError: one is missing; the message names the command that creates it.
    """
    for setting, name in starting_points(_arguments(module)):
        path = Path(name)
        if _is_local(name, root) and not path.exists():
            raise FileNotFoundError(
                f"{setting}={name} does not exist; {_remedy(path, _arguments(data), root, configs)}"
            )


def starting_points(arguments: Any) -> Iterator[tuple[str, str]]:
    """Yield the setting and the name of every model or checkpoint in a module's arguments."""
    yield from _named(arguments, OF_MODULES, "model.init_args")
    for number, objective in enumerate(arguments.get("objectives") or []):
        yield from _named(_arguments(objective), OF_OBJECTIVES, f"model.init_args.objectives.{number}.init_args")


def _named(arguments: Any, names: Sequence[str], place: str) -> Iterator[tuple[str, str]]:
    for name in names:
        value = arguments.get(name)
        if isinstance(value, str):
            yield f"{place}.{name}", value


def _arguments(settings: Any) -> Any:
    """Return the arguments of a class in the settings; there may be none."""
    return (settings or {}).get("init_args") or {}


def _is_local(name: str, root: str | Path) -> bool:
    """Return True if a name can only be a path."""
    first, top = Path(name).parts[:1], Path(root).parts[:1]
    return name.endswith(".ckpt") or first in ((), ("/",), ("..",), ("~",)) or name[:2] == "./" or first == top


def _remedy(path: Path, data: Any, root: str | Path, configs: Sequence[str | Path]) -> str:
    if path.suffix == ".ckpt":
        config = _config_that_writes(path.parent, configs)
        if config is not None:
            return f"create it first: hybridmem fit --config {shlex.quote(str(config))}"
        good = newest_good(path.parent)
        return "give a checkpoint of hybridmem fit" if good is None else f"the newest checkpoint there is {good}"
    tokenizer = data.get("tokenizer")
    known = isinstance(tokenizer, str) and tokenizer != "bytes" and not _is_local(tokenizer, root)
    convert = shlex.join(["hybridmem", "convert", "--model", tokenizer if known else "NAME", "--output", str(path)])
    other = "" if known else f" (or export a checkpoint: hybridmem export --ckpt_path FILE --output {path})"
    return f"create it first: {convert}{other}"


def _config_that_writes(folder: Path, configs: Sequence[str | Path]) -> Path | None:
    """Return the configuration that trains in a folder, from the given files' folder of configurations."""
    for place in dict.fromkeys(_place(Path(config)) for config in configs):
        for file in sorted(place.rglob("*.yaml")):
            trainer = (yaml.safe_load(file.read_text()) or {}).get("trainer") or {}
            if trainer.get("default_root_dir") == str(folder):
                return file
    return None


def _place(config: Path) -> Path:
    """Return the folder `configs` that holds a file, or else the file's own folder."""
    return next((parent for parent in config.parents if parent.name == CONFIGS), config.parent)
