"""`hybridmem consolidate`: conversion of a sharded checkpoint to one file."""

from pathlib import Path

from hybridmem.training.checkpoints.durable import DurableCheckpointIO
from hybridmem.training.checkpoints.loading import load_checkpoint


def consolidate(ckpt_path: Path, output: Path) -> None:
    """Merge a sharded checkpoint folder into one file, which any strategy and number of processes can resume.

    Args:
        ckpt_path: checkpoint folder of a sharded run.
        output: file to write, ending in .ckpt.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint is damaged, or already a single file.
    """
    if ckpt_path.is_file():
        raise ValueError(f"ckpt_path={ckpt_path} is already one file, which any strategy can read; use it directly")
    checkpoint = load_checkpoint(ckpt_path)
    names = sorted(name for name in checkpoint if name.startswith("optimizer_") and name[10:].isdigit())
    checkpoint["optimizer_states"] = [checkpoint.pop(name) for name in names]
    DurableCheckpointIO().save_checkpoint(checkpoint, output)
    print(f"wrote {output}")
