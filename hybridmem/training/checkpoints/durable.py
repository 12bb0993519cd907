"""Atomic, checksummed checkpoint files, each with its predecessor as a backup."""

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
GO_ON_FROM = ("last.ckpt", "interrupted.ckpt")  # from ModelCheckpoint and GracefulStop
PART = "checkpoint.part"
SEAL, DIGEST_SIZE = b"hybridmem blake2b ", 16


class DurableCheckpointIO(CheckpointIO):
    """Atomic, checksummed checkpoint files for Lightning.

    A checkpoint is written to checkpoint.part in the target folder, synced to disk and renamed. The file that it
    replaces, or that ModelCheckpoint removes, becomes previous.ckpt, so the folder always holds the last two states.
    Loading verifies the digest at the end of the file and executes no code from it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            StoppedError: writing to disk failed; earlier checkpoints are unchanged.
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
        except (OSError, RuntimeError) as error:  # torch wraps the disk's error in its own
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
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or weights_only is False.
        """
        if weights_only is False:
            raise ValueError("weights_only=false would execute code from the checkpoint; remove the setting")
        return read_checkpoint(Path(path), map_location)

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        """Remove a checkpoint, keeping the most recently removed file as previous.ckpt."""
        place = Path(path)
        if place.is_dir():
            shutil.rmtree(place)
        elif place.exists():
            _keep(place)
            place.unlink(missing_ok=True)


def read_checkpoint(path: Path, map_location: Any | None = None) -> Any:
    """Read a checkpoint file and verify its checksum.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged; the message names the newest intact checkpoint in the folder.
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
    """Append a digest of a torch archive as the archive's comment."""
    end = file.seek(0, os.SEEK_END) - 2  # the last two bytes are the comment's length
    seal = SEAL + digest_of(file, end)
    file.seek(end)
    file.write(struct.pack("<H", len(seal)) + seal)


def _compare(path: Path) -> None:
    """Raise a ValueError if a file does not match its digest, or, without a digest, the CRC32 of its records.

    torch checks neither, and would load a flipped byte as a weight.
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
    """Return the hexadecimal digest of a file's first `size` bytes."""
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    file.seek(0)
    while size and (part := file.read(min(size, 1 << 20))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode()


def to_go_on_from(folder: Path) -> Path | None:
    """Return the checkpoint that a stopped run resumes from: the newer of last.ckpt and interrupted.ckpt, or None."""
    found = [folder / name for name in GO_ON_FROM if (folder / name).exists()]
    return max(found, key=lambda path: path.stat().st_mtime_ns) if found else None


def newest_good(folder: Path, but: Path | None = None) -> Path | None:
    """Return the newest intact checkpoint file in a folder, or None."""
    files = sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in files:
        if file == but or not file.is_file():
            continue
        try:
            _read(file, "cpu")
        except Exception:  # any failure means a damaged file
            continue
        return file
    return None


def _instead(path: Path) -> str:
    good = newest_good(path.parent, but=path)
    return "" if good is None else f"; the newest intact checkpoint there is {good}, resume with --ckpt_path {good}"


def _cannot_write(place: Path, failure: OSError) -> str:
    free = shutil.disk_usage(place.parent).free
    good = newest_good(place.parent)
    resume = "start again (there is no earlier checkpoint)" if good is None else f"resume with --ckpt_path {good}"
    return (
        f"cannot write the checkpoint {place}: {failure.strerror}; the disk of {place.parent} has "
        f"{free / 2**20:,.0f} MiB left; free some space, then {resume}"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _keep(path: Path) -> None:
    """Make the file at `path` the previous checkpoint, unless the previous checkpoint is newer."""
    previous = path.with_name(PREVIOUS)
    if not path.is_file() or path == previous:
        return
    if previous.exists() and previous.stat().st_mtime_ns > path.stat().st_mtime_ns:
        return
    link = path.with_name(PART + ".link")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)  # keeps `path` in place throughout
    except OSError:  # the file system has no hard links
        os.replace(path, previous)
    else:
        os.replace(link, previous)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
