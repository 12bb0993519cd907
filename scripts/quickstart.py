"""Trains two small models, chooses heads of SmolLM2 by reward, and writes one page about both.

    python scripts/quickstart.py [--output runs/quickstart] [--rollouts 16] [--prompts 48]

Every stage leaves its result in the output folder. The same command resumes after Ctrl-C: it skips finished stages and
continues the one that was interrupted. Output of the stages goes to log.txt in that folder.
"""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

from rich.console import Console

INTERRUPTED = 128 + signal.SIGINT


def quiet(log: Path) -> Console:
    """Send the output of this process and its commands to a file, and return a console on the terminal."""
    terminal = os.fdopen(os.dup(1), "w")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    return Console(file=terminal, highlight=False, markup=False)


def main() -> None:
    """Run the stages that are missing, and print the path of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder of all results")
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"), help="of the small models")
    parser.add_argument(
        "--model", type=Path, help="folder of a model in place of SmolLM2, which is not downloaded then"
    )
    parser.add_argument(
        "--allocation",
        type=Path,
        default=Path("configs/allocations/smollm2_none_80.json"),
        help="heads from which the reward starts",
    )
    parser.add_argument(
        "--reward_config", type=Path, default=Path("configs/rl/allocation.yaml"), help="of learning from reward"
    )
    parser.add_argument("--rollouts", type=int, default=16, help="steps of learning from reward")
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts for each choice of heads")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "log.txt"
    console = quiet(log)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        console.print(f"results: {options.output}", soft_wrap=True)
        from quickstart_stages import run_all  # torch takes seconds to load, and its warnings belong in the log

        run_all(options, console)
    except KeyboardInterrupt:
        console.print("interrupted; run the same command to continue", soft_wrap=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        console.print(f"error: {' '.join(str(error).split())} (see {log})", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
