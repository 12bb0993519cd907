"""Allocations: a source for every KV head of a model, as a JSON file."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hybridmem.model.configuration import HEAD_SOURCES, HybridMemConfig


@dataclass(frozen=True)
class Allocation:
    """Sources of a model's KV heads, and the window of heads other than `full`.

    Args:
        model: the base model's name.
        attention_window: number of tokens visible to heads other than `full`.
        num_sink_tokens: first tokens of a document that these heads see as well.
        head_sources: for each layer, a list of `full`, `memory` or `none` for its KV heads; empty for other variants.
        trained: provenance: objective, task, prompts, seed, command.
        path: the file it was loaded from, for error messages.
    """

    model: str
    attention_window: int
    num_sink_tokens: int
    head_sources: list[list[str]]
    trained: dict[str, Any] = field(default_factory=dict)
    path: Path | None = field(default=None, compare=False)

    @property
    def closed(self) -> float:
        """Return the share of KV heads other than `full`."""
        sources = list(chain.from_iterable(self.head_sources))
        return 1 - sources.count("full") / len(sources)

    @classmethod
    def load(cls, path: str | Path) -> "Allocation":
        """Load an allocation from a file.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is not an allocation; the message names the file and the entry.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"allocation={path} does not exist: name a JSON file")
        try:
            values = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"allocation={path} is not JSON ({error}): write it again") from error
        return cls.from_dict(values, path)

    @classmethod
    def from_dict(cls, values: Any, path: Path | None = None) -> "Allocation":
        """Create an allocation from the result of `to_dict`.

        Raises:
            ValueError: an entry is missing, unknown or of the wrong type, or `closed` contradicts the sources.
        """
        place = _place(path)
        if not isinstance(values, dict):
            raise ValueError(f"{place} holds a {type(values).__name__}: write an object with head_sources")
        wanted = {"model": str, "attention_window": int, "num_sink_tokens": int, "head_sources": list, "trained": dict}
        unknown = sorted(values.keys() - wanted.keys() - {"closed"})
        if unknown:
            raise ValueError(f"{place} holds {unknown[0]!r}, which is unknown: remove it, or move it into trained")
        for name, kind in wanted.items():
            if name not in values and name != "trained":
                raise ValueError(f"{place} lacks {name}: add it")
            if type(values.get(name, kind())) is not kind:
                raise ValueError(f"{place}: {name}={values[name]!r} must be of type {kind.__name__}")
        for name, least in (("attention_window", 1), ("num_sink_tokens", 0)):
            if values[name] < least:
                raise ValueError(f"{place}: {name}={values[name]} must be at least {least}")
        _check_sources(values["head_sources"], place)
        found = cls(**{name: values[name] for name in wanted if name in values}, path=path)
        closed, heads = values.get("closed", found.closed), sum(map(len, found.head_sources))
        if not isinstance(closed, int | float) or abs(closed - found.closed) > 1 / heads:
            raise ValueError(
                f"{place}: closed={closed!r} but {round(found.closed * heads)} of {heads} heads are not full: correct "
                "closed or head_sources"
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the allocation as plain values, with the entries of its file."""
        values = {name: value for name, value in asdict(self).items() if name not in ("trained", "path")}
        return values | {"closed": round(self.closed, 4), "trained": self.trained}

    def save(self, path: str | Path) -> None:
        """Write the allocation to a file, with one line per layer."""
        rows = ",\n".join(f"  {json.dumps(row)}" for row in self.head_sources)
        entries = {name: json.dumps(value) for name, value in self.to_dict().items()}
        entries["head_sources"] = f"[\n{rows}\n ]"
        Path(path).write_text("{\n" + ",\n".join(f' "{name}": {text}' for name, text in entries.items()) + "\n}\n")

    def check(self, config: PreTrainedConfig, memories: Collection[int] = ()) -> None:
        """Check that the allocation fits a model.

        Args:
            config: the model's configuration.
            memories: indices of layers with a memory.

        Raises:
            ValueError: the shape differs from the model's, the model lacks a memory, or its memories were fitted to
                another window.
        """
        place, expected = _place(self.path), kv_heads(config)
        found = [len(row) for row in self.head_sources]
        if found != expected:
            raise ValueError(
                f"{place} names {_shape(found)} but the model has {_shape(expected)}: choose an allocation of this "
                f"model (it was made for {self.model!r})"
            )
        for layer, row in enumerate(self.head_sources):
            if "memory" in row and layer not in memories:
                raise ValueError(
                    f"{place} names memory in layer {layer}, where the model has no memory: fit memories first "
                    "(docs/retrofit.md), or choose an allocation with none in place of memory"
                )
        if isinstance(config, HybridMemConfig) and self.reads_memory:
            fitted = (config.attention_window, config.num_sink_tokens)
            if fitted != (self.attention_window, self.num_sink_tokens):
                raise ValueError(
                    f"{place} has attention_window={self.attention_window} and num_sink_tokens={self.num_sink_tokens} "
                    f"but the model's memories were fitted to {fitted[0]} and {fitted[1]}: set those, or fit the "
                    "memories again"
                )

    @property
    def reads_memory(self) -> bool:
        """Return True if a head reads a memory."""
        return any("memory" in row for row in self.head_sources)


def kv_heads(config: PreTrainedConfig) -> list[int]:
    """Return each layer's number of KV heads with a source; 0 for layers of a HybridMem model other than `mah`."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    ours = isinstance(config, HybridMemConfig)
    return [0 if ours and config.layer_type(layer) != "mah" else heads for layer in range(config.num_hidden_layers)]


def _place(path: Path | None) -> str:
    return "the allocation" if path is None else f"allocation={path}"


def _check_sources(layers: list[Any], place: str) -> None:
    if not all(isinstance(row, list) for row in layers) or not any(layers):
        raise ValueError(f"{place}: head_sources must hold a list of sources for each layer")
    for layer, row in enumerate(layers):
        for head, source in enumerate(row):
            if source not in HEAD_SOURCES:
                raise ValueError(
                    f"{place}: head_sources[{layer}][{head}]={source!r} is unknown: choose one of "
                    f"{', '.join(HEAD_SOURCES)}"
                )


def _shape(heads: list[int]) -> str:
    """Describe a shape in layers and KV heads."""
    sizes = sorted(set(heads))
    return f"{len(heads)} layers of {' or '.join(map(str, sizes))} KV heads"
