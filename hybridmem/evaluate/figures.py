"""Heat maps of scores by task and length."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cells import ANY_LENGTH, LOSS, Cells

BITS = 8  # of a byte without compression
LUMINANCE = np.array([0.3, 0.59, 0.11])


def draw_heat_map(cells: Cells, rows: list[str], lengths: list[int], title: str, path: Path) -> None:
    """Draw accuracies at the top, and any measured bits per byte below."""
    accuracies, losses = ([row for row in rows if row.endswith(LOSS) == is_loss] for is_loss in (False, True))
    parts = [part for part in (("accuracy", accuracies), ("bits per byte", losses)) if part[1]]
    size = (2.6 + 0.9 * len(lengths), 1.4 + 0.45 * len(rows) + 0.4 * len(parts))
    figure = Figure(figsize=size, layout="constrained")
    heights = [len(names) for _, names in parts]
    axes = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for each, (label, names) in zip(axes, parts, strict=True):
        _draw(each, cells, names, lengths, label)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)


def _draw(axes: Axes, cells: Cells, rows: list[str], lengths: list[int], label: str) -> None:
    found = [[cells.get(row, length) for length in lengths] for row in rows]
    scores = np.array([[np.nan if cell is None else cell["score"] for cell in row] for row in found], dtype=float)
    shares = label == "accuracy"
    most, colors = (1, "viridis") if shares else (BITS, "viridis_r")
    image = axes.imshow(scores, aspect="auto", vmin=0, vmax=most, cmap=colors)
    axes.set_xticks(range(len(lengths)), [name_of_length(length) for length in lengths])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title(label, fontsize=9, loc="left")
    axes.tick_params(labelsize=8, length=0)
    for (y, x), score in np.ndenumerate(scores):
        if not np.isnan(score):
            text = f"{100 * score:.0f} %" if shares else f"{score:.2f}"
            color = "black" if np.dot(image.to_rgba(score)[:3], LUMINANCE) > 0.5 else "white"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=color)


def name_of_length(length: int) -> str:
    """Return a length in its short form: 4096 is "4k"."""
    if length == ANY_LENGTH:
        return "any"
    for unit, letter in ((1 << 20, "m"), (1 << 10, "k")):
        if length % unit == 0:
            return f"{length // unit}{letter}"
    return str(length)
