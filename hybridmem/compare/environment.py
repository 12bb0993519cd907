"""Versions, commit and hardware of a run, recorded in its folder."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("hybridmem", "torch", "transformers", "lightning", "numpy")
NAME = "environment.json"


def write_environment(folder: Path) -> None:
    """Record this process's environment in a run's folder."""
    (folder / NAME).write_text(json.dumps(environment(), indent=1) + "\n")


def read_environment(folder: Path) -> dict[str, Any] | None:
    """Return a run's recorded environment, or None if there is no record."""
    path = folder / NAME
    return json.loads(path.read_text()) if path.exists() else None


def environment() -> dict[str, Any]:
    """Return versions, commit and hardware."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
        "commit": git.stdout.strip() if git.returncode == 0 else None,
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    }


def processor() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
