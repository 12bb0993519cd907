"""Weights read from safetensors and masks written to them, tensor by tensor, so that neither has to fit in memory."""

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
SHOWN = 3  # names listed in an error
ALIGNMENT = 8  # bytes, of the data in a safetensors file


class StoredWeights(Mapping[str, Tensor]):
    """Tensors of a Hugging Face folder, sharded or not, or of a safetensors file, read lazily.

    Args:
        path: the folder or the file.

    Raises:
        ValueError: the path does not exist or holds no readable safetensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # in the notation of safetensors, such as BF16
        self._files: dict[str, Path] = {}
        for file in _safetensors_files(self.path):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a mapping)
                        stored = opened.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(stored.get_shape()), stored.get_dtype()
                        self._files[name] = file
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read as safetensors: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        # The file is reopened for each tensor, because an open file keeps all tensors read so far mapped.
        with safe_open(self._files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __contains__(self, name: object) -> bool:  # the default of Mapping would read the tensor
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __repr__(self) -> str:
        return str(self.path)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by name, without reading stored tensors."""
    if isinstance(weights, StoredWeights):
        return weights.shapes
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def is_float(weights: Mapping[str, Tensor], name: str) -> bool:
    """Return True for a floating-point tensor, without reading a stored tensor."""
    if isinstance(weights, StoredWeights):
        return weights.dtypes[name].startswith(("F", "BF"))
    return weights[name].is_floating_point()


def listed(names: Sequence[str]) -> str:
    """Format names for an error: the first ones, and their number if there are more; empty without names."""
    shown = ", ".join(names[:SHOWN])
    return f"{shown} … ({len(names)} tensors)" if len(names) > SHOWN else shown


def write_masks(
    path: Path, shapes: Mapping[str, tuple[int, ...]], masks: Iterable[tuple[str, Bool[Tensor, "..."]]]
) -> None:
    """Write masks to a safetensors file as they are generated, one in memory at a time, in the order of `shapes`.

    The write is atomic.
    """
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape)  # one byte per entry
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
    """List the files that hold a model's tensors, from its index if there is one."""
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
