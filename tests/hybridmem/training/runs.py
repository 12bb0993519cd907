"""Small training runs through the command line's entry point."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import yaml

from hybridmem.cli.main import main


def write_text(folder: Path, documents: int = 12) -> Path:
    """Write a folder of small files that each repeat one line."""
    folder.mkdir(exist_ok=True)
    for n in range(documents):
        (folder / f"{n}.txt").write_text(f"value_{n} = {n * 7919} # line\n" * (10 + n))
    return folder


def write_config(folder: Path, **changes) -> Path:
    """Write a configuration of a few steps to `folder`; `changes` are dotted keys."""
    text = write_text(folder / "text")
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 6,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "gradient_clip_val": 1.0,
            "default_root_dir": str(folder / "run"),
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "filename": "{step}",
                        "save_top_k": -1,
                        "every_n_train_steps": 1,
                    },
                }
            ],
        },
        "model": {
            "class_path": "hybridmem.training.PretrainModule",
            "init_args": {
                "config": {
                    "variant": "mag",
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 8,
                    "attention_window": 8,
                    "segment_length": 8,
                    "memory_heads": 2,
                    "memory_head_dim": 8,
                    "memory_chunk_size": 8,
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "lr_scheduler": {
                    "class_path": "hybridmem.training.WarmupCosine",
                    "init_args": {"warmup_steps": 2},
                },
            },
        },
        "data": {
            "class_path": "hybridmem.data.TextDataModule",
            "init_args": {
                "path": str(text),
                "pattern": "*.txt",
                "sequence_length": 32,
                "batch_size": 2,
                "val_fraction": 0.2,
            },
        },
    }
    for key, value in changes.items():
        place = config
        *path, last = key.split("__")
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def hybridmem(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run `hybridmem` in this process."""
    monkeypatch.setattr(sys, "argv", ["hybridmem", *map(str, arguments)])
    # Both are for the whole process, and results should not depend on the machine.
    monkeypatch.setattr("hybridmem.cli.main.keep_freed_memory", lambda: False)
    monkeypatch.setattr("hybridmem.cli.main.flush_denormals", lambda: False)
    monkeypatch.setattr("hybridmem.training.precision.bfloat16_hardware", lambda: None)
    main()


def logged(folder: Path, name: str) -> list[float]:
    """Return the values that a run logged under a name, step by step, over all restarts."""
    values = {}
    for file in sorted((folder / "run" / "csv").glob("version_*/metrics.csv")):
        for row in csv.DictReader(file.open()):
            if row.get(name):
                values[int(row["step"])] = float(row[name])
    return [values[step] for step in sorted(values)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a checkpoint."""
    return torch.load(path, weights_only=True)["state_dict"]


class Touch:
    """Object whose unpickling would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
