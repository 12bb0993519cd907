"""Loading of Lightning checkpoints as dictionaries, from files or the folders of sharded runs."""

import tempfile
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from hybridmem.checks import refuse_adapter

from .durable import read_checkpoint
from .sharded import check_shards, is_sharded


def load_checkpoint(path: str | Path, weights: bool = True, rank: int = 0, size: int = 1) -> dict[str, Any]:
    """Read a Lightning checkpoint, a file or a sharded run's folder, without executing code from it.

    Args:
        path: checkpoint file or folder.
        weights: gather a folder's weights; False reads only the metadata.
        rank, size: this process and the number of processes that read a folder; each verifies a share of the digests.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or hybridmem did not write it.
    """
    path = Path(path)
    refuse_adapter(path)
    if path.is_dir() and path.suffix != ".ckpt" and not is_sharded(path):
        raise ValueError(
            f"ckpt_path={path} is not a checkpoint folder; give a .ckpt file, or the folder of a sharded checkpoint"
        )
    checkpoint = _read_shards(path, weights, rank, size) if is_sharded(path) else read_checkpoint(path, "cpu")
    if not isinstance(checkpoint, dict) or not checkpoint.keys() & {"hybridmem_config", "transformers_config"}:
        raise ValueError(f"ckpt_path={path} was not written by hybridmem; give a checkpoint of hybridmem fit")
    return checkpoint


def _read_shards(path: Path, weights: bool, rank: int, size: int) -> dict[str, Any]:
    check_shards(path, rank, size)
    checkpoint = read_checkpoint(path / "meta.pt", "cpu")
    if weights:
        with tempfile.TemporaryDirectory() as folder:
            gathered = Path(folder) / "weights.pt"
            try:
                dcp_to_torch_save(path, gathered)
            except Exception as error:
                raise ValueError(f"ckpt_path={path} cannot be read as a checkpoint: {error}") from error
            checkpoint |= read_checkpoint(gathered, "cpu")
    return checkpoint
