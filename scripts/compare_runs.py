"""Compares pretraining runs: held-out bits per byte, loss by position, and a figure of the training curves.

python scripts/compare_runs.py runs/a runs/b --output curves.png
"""

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from hybridmem.training.logs import read_log

AT_POSITION = "val/bits_per_byte_at/"


def last(values: dict[int, float]) -> float:
    """Return the value at the last step."""
    return values[max(values)]


def loss_by_position(log: dict[str, dict[int, float]]) -> dict[str, float]:
    """Return held-out bits per byte by range of positions, in order."""
    ranges = {
        name.removeprefix(AT_POSITION): last(values) for name, values in log.items() if name.startswith(AT_POSITION)
    }
    return dict(sorted(ranges.items(), key=lambda item: int(item[0][1:].split(",")[0])))


def print_table(logs: dict[str, dict[str, dict[int, float]]]) -> None:
    """Print held-out bits per byte of every run, overall and by position."""
    positions = list(dict.fromkeys(name for log in logs.values() for name in loss_by_position(log)))
    width = max(map(len, [*logs, "tokens read before"]))
    print(f"\nheld-out bits per byte\n{'':{width}}  {'all':>7}  steps")
    for name, log in logs.items():
        print(f"{name:{width}}  {last(log['val/bits_per_byte']):7.3f}  {max(log['val/bits_per_byte']) + 1}")
    columns = [max(7, len(position)) for position in positions]
    cells = "  ".join(f"{position:>{column}}" for position, column in zip(positions, columns, strict=True))
    print(f"\n{'tokens read before':{width}}  {cells}")
    for name, log in logs.items():
        by_position = loss_by_position(log)
        cells = "  ".join(f"{by_position.get(p, float('nan')):{c}.3f}" for p, c in zip(positions, columns, strict=True))
        print(f"{name:{width}}  {cells}")


def draw(logs: dict[str, dict[str, dict[int, float]]], output: Path) -> None:
    """Draw training curves and loss by position."""
    figure, (curves, positions) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lowest = []
    for name, log in logs.items():
        steps, bits = zip(*sorted(log["train/bits_per_byte"].items()), strict=True)
        window = max(1, len(bits) // 20)
        smooth = [
            sum(bits[max(0, i - window) : i + 1]) / len(bits[max(0, i - window) : i + 1]) for i in range(len(bits))
        ]
        (line,) = curves.plot(steps, smooth, label=name)
        held_out = log["val/bits_per_byte"]
        lowest.append(min(*smooth, *held_out.values()))
        curves.plot(list(held_out), list(held_out.values()), "o", color=line.get_color())
        by_position = loss_by_position(log)
        positions.plot(list(by_position), list(by_position.values()), "o-", color=line.get_color(), label=name)
    curves.set(xlabel="optimiser steps", ylabel="bits per byte", title="training (line) and held out (dot)")
    positions.set(xlabel="tokens of the document read before", title="held out, by position")
    positions.tick_params(axis="x", rotation=20)
    curves.set_ylim(min(lowest) - 0.1, min(lowest) + 3)
    for axes in (curves, positions):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    print(f"\nwrote {output}")


def main() -> None:
    """Print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders (trainer.default_root_dir)")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="figure to write")
    arguments = parser.parse_args()
    by_name = len({run.name for run in arguments.runs}) == len(arguments.runs)
    try:
        logs = {run.name if by_name else str(run): read_log(run) for run in arguments.runs}
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from error
    print_table(logs)
    draw(logs, arguments.output)


if __name__ == "__main__":
    main()
