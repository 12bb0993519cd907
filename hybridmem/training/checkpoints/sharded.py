"""Atomic, checksummed checkpoint folders of sharded runs, each with its predecessor as a backup."""

import os
import pickle
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from .durable import PART, PREVIOUS, digest_of, sync

SEALS = "*.b2"  # digests of the files that each process wrote, in the format of `b2sum --length 128`
# Classes that a sharded checkpoint's .metadata may contain; torch reads it with pickle.
DESCRIPTION = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class DurableModelParallelStrategy(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with atomic, checksummed checkpoints.

    The processes write to a temporary folder next to the checkpoint, and each syncs and seals its own files. The folder
    is then renamed, and the checkpoint that it replaces becomes previous.ckpt.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, as a folder or, if save_distributed_checkpoint is False, as a file."""
        if not self._save_distributed_checkpoint:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        place = Path(self.broadcast(filepath))
        part = place.with_name(PART)
        if self.is_global_zero:
            shutil.rmtree(part, ignore_errors=True)
        self.barrier("no part of a checkpoint that was cut short is left")
        super().save_checkpoint(checkpoint, part, storage_options)
        seal(part, self.global_rank)
        self.barrier("all files of the checkpoint are sealed")
        if self.is_global_zero:
            put_in_place(part, place)
        self.barrier("the checkpoint is in its place")


def is_sharded(path: str | Path) -> bool:
    """Return True if a checkpoint is the folder of a sharded run."""
    return (Path(path) / "meta.pt").is_file()


def seal(folder: Path, rank: int) -> None:
    """Sync the files that a process wrote to disk, and write their digests."""
    own = sorted(folder.glob(f"__{rank}_*"))
    if rank == 0:
        own += [folder / ".metadata", folder / "meta.pt"]
    digests = folder / SEALS.replace("*", str(rank))
    digests.write_text("".join(f"{_digest(file)}  {file.name}\n" for file in own))
    for file in (*own, digests):
        sync(file)


def check_shards(folder: Path, rank: int = 0, size: int = 1) -> None:
    """Verify a folder's digests, and that unpickling its .metadata runs no foreign code.

    Args:
        folder: checkpoint of a sharded run.
        rank, size: this process and the number of processes, each of which verifies a share of the files.

    Raises:
        ValueError: a file is damaged or unsafe; the message names the file and the problem.
    """
    lines = [line for seals in sorted(folder.glob(SEALS)) for line in seals.read_text().splitlines()]
    for line in lines[rank::size]:
        expected, _, name = line.partition("  ")
        file = folder / Path(name).name
        if not file.is_file() or _digest(file) != expected:
            raise ValueError(
                f"ckpt_path={folder}: file {name} does not match its checksum; resume from another checkpoint"
            )
    try:
        _Description(BytesIO((folder / ".metadata").read_bytes())).load()
    except Exception as error:
        raise ValueError(f"{folder / '.metadata'} is not the metadata of a checkpoint: {error}") from error


class _Description(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in DESCRIPTION.get(module, ()):
            raise pickle.UnpicklingError(f"it references {module}.{name}, which unpickling would execute")
        return super().find_class(module, name)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return digest_of(opened, file.stat().st_size).decode()


def put_in_place(part: Path, place: Path) -> None:
    """Move a folder into place; the folder that it replaces becomes the previous checkpoint."""
    previous = place.with_name(PREVIOUS)
    if place.exists():
        if previous.is_dir():
            shutil.rmtree(previous)
        previous.unlink(missing_ok=True)
        os.replace(place, previous)
    os.replace(part, place)
    sync(place.parent)
