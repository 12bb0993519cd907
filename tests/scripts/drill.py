"""Run of the fault drill."""

import json
import subprocess
import sys
from pathlib import Path

from tests.unchecked import ROOT


def drilled(folder: Path, times: int, *faults: str) -> dict[str, dict[str, int]]:
    """Inject faults in short runs, and return the outcomes of each."""
    figures = folder / "figures.json"
    sizes = dict(batches=12, kills=2, times=times, reads=40, seed=1, output=figures)
    options = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    # A separate process, because the drill forks and needs a fresh parent.
    command = [sys.executable, ROOT / "scripts" / "fault_drill.py", *options, "--faults", *faults]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert not found["failures"]
    return found["faults"]
