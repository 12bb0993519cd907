"""Checkpoint files that are whole or not there: written beside, checked when they are read, the one before kept."""

import hashlib
import os
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from hybridmem.training.errors import StoppedError

PREVIOUS = "previous.ckpt"
GO_ON_FROM = ("last.ckpt", "interrupted.ckpt")  # ModelCheckpoint's and GracefulStop's
PART = "checkpoint.part"
SEAL, DIGEST_SIZE = b"hybridmem blake2b ", 16


class DurableCheckpointIO(CheckpointIO):
    """Lightning's checkpoint files, so that one is always good.

    A checkpoint is written to checkpoint.part beside its place, synced to the disk, and renamed. What it replaces, and
    what ModelCheckpoint removes, stays as previous.ckpt, so a folder holds the state before the newest one too. Reading
    compares the file with the digest that it ends with, and runs nothing that it holds.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            StoppedError: the disk does not take it; the earlier checkpoints are as they were.
        """
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(PART)
        try:
            with part.open("w+b") as file:
                torch.save(checkpoint, file)
                _seal(file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch hides the disk's error behind one of its own
            part.unlink(missing_ok=True)
            failure = next((cause for cause in _causes(error) if isinstance(cause, OSError)), None)
            if failure is None:
                raise
            raise StoppedError(_cannot_write(place, failure)) from error
        _keep(place)
        os.replace(part, place)
        sync(place.parent)

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            FileNotFoundError, ValueError: see `read_checkpoint`; or weights_only is False.
        """
        if weights_only is False:
            raise ValueError("weights_only=false would run what is in the checkpoint: leave it out")
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        """Remove a checkpoint that is not wanted any more; the newest of these is kept."""
        place = Path(path)
        if place.is_dir():
            shutil.rmtree(place)
        elif place.exists():
            _keep(place)
            place.unlink(missing_ok=True)


def read_checkpoint(path: Path, map_location: Any | None = None) -> Any:
    """What a checkpoint file holds, compared with its checksum.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not as it was written; the message names the newest good one beside it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path={path} does not exist{_instead(path)}")
    try:
        return _read(path, map_location)
    except Exception as error:
        raise ValueError(f"ckpt_path={path} cannot be read as a checkpoint: {error}{_instead(path)}") from error


def _read(path: Path, map_location: Any | None) -> Any:
    _compare(path)
    return torch.load(path, map_location=map_location, weights_only=True)


def _seal(file: BinaryIO) -> None:
    """End an archive of torch with a comment that holds the digest of all before it."""
    end = file.seek(0, os.SEEK_END) - 2  # the last two bytes are the comment's length
    seal = SEAL + digest_of(file, end)
    file.seek(end)
    file.write(struct.pack("<H", len(seal)) + seal)


def _compare(path: Path) -> None:
    """Refuse a file that is not what its seal says; of another writer's, without one, records that are not their CRC32.

    torch itself compares neither: it takes a flipped byte for a weight.
    """
    length = len(SEAL) + 2 * DIGEST_SIZE
    with path.open("rb") as file:
        end = max(file.seek(0, os.SEEK_END) - length, 2)
        file.seek(end)
        seal = file.read()
        if seal.startswith(SEAL):
            if seal != SEAL + digest_of(file, end - 2):
                raise ValueError("it does not match its checksum")
            return
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"its record {broken} does not match its checksum")


def digest_of(file: BinaryIO, size: int) -> bytes:
    """The digest of a file's first `size` bytes, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    file.seek(0)
    while size and (part := file.read(min(size, 1 << 20))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode()


def to_go_on_from(folder: Path) -> Path | None:
    """Where a stopped run goes on: the newer of last.ckpt and interrupted.ckpt; None where there is neither."""
    found = [folder / name for name in GO_ON_FROM if (folder / name).exists()]
    return max(found, key=lambda path: path.stat().st_mtime_ns) if found else None


def newest_good(folder: Path, but: Path | None = None) -> Path | None:
    """The newest checkpoint file of a folder that can be read."""
    files = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files:
        if file == but or not file.is_file():
            continue
        try:
            _read(file, "cpu")
        except Exception:  # whatever is wrong with it, it is not good
            continue
        return file
    return None


def _instead(path: Path) -> str:
    good = newest_good(path.parent, but=path)
    return "" if good is None else f"; the newest good one there is {good}: go on with --ckpt_path {good}"


def _cannot_write(place: Path, failure: OSError) -> str:
    free = shutil.disk_usage(place.parent).free
    good = newest_good(place.parent)
    kept = "no earlier one is there" if good is None else f"go on with --ckpt_path {good}, which is as it was"
    return (
        f"the checkpoint {place} cannot be written: {failure.strerror}; the disk of {place.parent} has "
        f"{free / 2**20:,.0f} MiB left: make room, then {kept}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _keep(path: Path) -> None:
    """Let the file at `path` be the previous one, unless that is newer: an old interrupted.ckpt is not."""
    previous = path.with_name(PREVIOUS)
    if not path.is_file() or path == previous:
        return
    if previous.exists() and previous.stat().st_mtime_ns > path.stat().st_mtime_ns:
        return
    link = path.with_name(PART + ".link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)  # so that `path` itself is never missing
    except OSError:  # a file system without hard links
        os.replace(path, previous)
    else:
        os.replace(link, previous)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
