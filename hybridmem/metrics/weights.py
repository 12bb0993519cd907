"""Weights read tensor by tensor from safetensors, and masks written so: neither model nor mask has to fit in memory."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridmem.checks import refuse_adapter

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHOWN = 3  # names in an error
ALIGNMENT = 8  # bytes that the data of a safetensors file is aligned to


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a Hugging Face folder, sharded or not, or of a safetensors file, each read when it is asked for.

    Args:
        path: the folder or the file.

    Raises:
        ValueError: the path does not exist, or holds no safetensors that can be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors writes them, such as BF16
        self._files: dict[str, Path] = {}
        for file in _safetensors_files(self.path):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                        stored = opened.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(stored.get_shape()), stored.get_dtype()
                        self._files[name] = file
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read as safetensors: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        # Opened anew for each tensor: a file that stays open keeps what was read of it mapped.
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return str(self.path)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, without reading stored ones."""
    if isinstance(weights, StoredWeights):
        return weights.shapes
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def is_float(weights: Mapping[str, Tensor], name: str) -> bool:
    """Whether a tensor is one of floats, without reading a stored one."""
    if isinstance(weights, StoredWeights):
        return weights.dtypes[name].startswith(("F", "BF"))
    return weights[name].is_floating_point()


def listed(names: Sequence[str]) -> str:
    """Names for an error: the first ones, and how many there are; empty for none."""
    shown = ", ".join(names[:SHOWN])
    return f"{shown} … ({len(names)} tensors)" if len(names) > SHOWN else shown


def write_masks(
    path: Path, shapes: Mapping[str, tuple[int, ...]], masks: Iterable[tuple[str, Bool[Tensor, "..."]]]
) -> None:
    """Write masks as a safetensors file while they are made, one in memory at a time, in the order of `shapes`.

    The file appears when all of it is written.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape)  # a byte for an entry
        header[name] = {"dtype": "BOOL", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for (name, mask), expected in zip(masks, shapes, strict=True):
            assert name == expected
            file.write(mask.contiguous().view(torch.uint8).numpy().data)
    unfinished.replace(path)


def _safetensors_files(path: Path) -> list[Path]:
    """The files that hold a model's tensors: what an index names where there is one."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: give a Hugging Face folder or a safetensors file")
    if (path / INDEX).is_file():
        files = sorted({path / name for name in json.loads((path / INDEX).read_text())["weight_map"].values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}, which its {INDEX} names: copy the whole folder")
        return files
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    refuse_adapter(path)
    raise ValueError(
        f"{path} holds neither {SINGLE} nor {INDEX}: save the model as safetensors (save_pretrained, hybridmem export)"
    )
