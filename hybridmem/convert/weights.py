"""Weights that are read tensor by tensor from a model or a safetensors folder, and written in shards."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .family import new_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Weight:
    """Tensor that is read lazily."""

    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor]


def weights_of_model(model: nn.Module) -> dict[str, Weight]:
    """Return lazy copies of a model's tensors, under their new names."""
    found: dict[str, Weight] = {}
    for name, tensor in model.state_dict().items():
        renamed = new_name(name)
        if renamed is not None:
            size = tensor.numel() * tensor.element_size()
            found[renamed] = Weight(tuple(tensor.shape), size, tensor.detach().clone)
    return found


def weights_of_folder(folder: Path, files: ExitStack) -> dict[str, Weight]:
    """Return the tensors of a folder's safetensors lazily, under their new names.

    Args:
        folder: a Hugging Face folder, sharded or not.
        files: stack that keeps the files open.

    Raises:
        FileNotFoundError: the folder has no safetensors, or a shard of the index is missing.
        ValueError: a file is broken or quantised.
    """
    found: dict[str, Weight] = {}
    for path in _weight_files(folder):
        try:
            opened = files.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}): fetch it again") from error
        for name in opened.keys():  # noqa: SIM118  not a dict
            renamed = new_name(name)
            if renamed is None:
                continue
            part = opened.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            if dtype not in BYTES or not dtype.startswith(("F", "BF")):
                raise ValueError(f"{name} in {path.name} is {dtype}: convert a model without quantisation")
            found[renamed] = Weight(shape, prod(shape) * BYTES[dtype], partial(opened.get_tensor, name))
    return found


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is broken ({error}): fetch it again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"model={folder} lacks {missing[0]}, which {INDEX} names: fetch it again")
        return [folder / name for name in names]
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"model={folder} holds no {WEIGHTS}: load it with transformers and save_pretrained it to another folder"
        )
    return [folder / WEIGHTS]


def check_weights(found: dict[str, Weight], model: nn.Module, tied: bool) -> dict[str, Weight]:
    """Return the weights of a converted model, in its order.

    Raises:
        ValueError: a weight is missing, unknown or has the wrong shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
        found = {name: weight for name, weight in found.items() if name != "lm_head.weight"}
    unknown, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    if unknown:
        raise ValueError(
            f"the model has a tensor {unknown[0]} that is unknown in its family: convert the base model without it"
        )
    if missing:
        raise ValueError(f"the model lacks {missing[0]}: convert a whole causal language model")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{name} has shape {list(found[name].shape)} instead of the configuration's {list(shape)}: correct "
                "config.json"
            )
    return {name: found[name] for name in expected}


def plan_shards(weights: dict[str, Weight], max_bytes: int) -> list[list[str]]:
    """Return the names in each shard; a shard larger than `max_bytes` contains a single tensor."""
    shards: list[list[str]] = []
    size = max_bytes + 1
    for name, weight in weights.items():
        if size + weight.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.nbytes
    return shards


def write_shards(
    weights: dict[str, Weight], shards: list[list[str]], folder: Path, track: Callable[[list[Any]], Iterable[Any]]
) -> None:
    """Write safetensors and, for several shards, their index, with one shard in memory at a time."""
    names = [
        WEIGHTS if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
        for n in range(1, len(shards) + 1)
    ]
    for name, shard in track(list(zip(names, shards, strict=True))):
        save_file({key: weights[key].read().contiguous() for key in shard}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(weight.nbytes for weight in weights.values())
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))


def available_memory() -> int | None:
    """Return the number of bytes available for new tensors, or None if the system does not report it."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def read_all(weights: dict[str, Weight], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor, converted to `dtype` unless it is None."""
    for name, weight in weights.items():
        tensor = weight.read()
        yield name, tensor if dtype is None else tensor.to(dtype)
