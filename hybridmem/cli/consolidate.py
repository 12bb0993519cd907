"""`hybridmem consolidate`: a sharded run's checkpoint as one file."""

from pathlib import Path

from hybridmem.training.checkpoints.durable import DurableCheckpointIO
from hybridmem.training.checkpoints.loading import load_checkpoint


def consolidate(ckpt_path: Path, output: Path) -> None:
    """Make one file of the folder that a sharded run writes, to go on from with any strategy and number of processes.

    Args:
        ckpt_path: the folder.
        output: the file to write, ending in .ckpt.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that is a file already.
    """
    if ckpt_path.is_file():
        raise ValueError(f"ckpt_path={ckpt_path} is one file already: any strategy can go on from it")
    checkpoint = load_checkpoint(ckpt_path)
    names = sorted(name for name in checkpoint if name.startswith("optimizer_") and name[10:].isdigit())
    checkpoint["optimizer_states"] = [checkpoint.pop(name) for name in names]
    DurableCheckpointIO().save_checkpoint(checkpoint, output)
    print(f"wrote {output}")
