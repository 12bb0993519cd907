"""Figures of the report, drawn from results.json."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from hybridmem.metrics.interval import mean_interval

from .grid import START
from .results import by_value, columns_of, metric_name

Rows = list[dict[str, Any]]
Color = tuple[float, ...]
Colors = dict[str, Color]  # by control
DRIFT = {
    "divergence_from_start": "divergence from start, nats",
    "effective_span": "effective span, tokens",
    "mean_distance": "mean distance, tokens",
    "allocation/memory": "share of attention on memory",
}
COLLAPSE = {
    "val/format/entropy": "format entropy, nats",
    "collapse/diversity": "attention diversity, nats",
    "collapse/distinct_patterns": "attention patterns per group",
}
STEPS = "batches of prompts"
CLOSED = "closed"  # the column of AllocationCurve, drawn on a numerical axis
LEAST_RANGE = 0.1  # minimum range of an axis of shares


def draw_all(task: dict[str, Any], folder: Path) -> dict[str, tuple[Path, str]]:
    """Write the figures of a task, and return each one's file and alternative text by title."""
    drawn: dict[str, tuple[Path, str]] = {}
    finished = [row for row in task["summary"] if "score" in row]
    if not finished:
        return drawn
    folder.mkdir(parents=True, exist_ok=True)
    name, labels = metric_name(task), dict.fromkeys(row["label"] for row in finished)
    metric = {task["metric"]: f"held-out {name}"}
    colors = {label: _color(number) for number, label in enumerate(labels)}  # shared by all figures
    plans: list[tuple[str, str, Callable[[], Figure | None]]] = [
        ("score", f"Held-out {name}", lambda: bars(finished, colors, f"held-out {name}")),
        ("curves", f"Held-out {name} over training", lambda: curves(task["cells"], metric, colors, shares=True)),
        ("by_column", "Accuracy by part of the task", lambda: by_column(finished, colors)),
        ("attention", "Attention over training", lambda: curves(task["cells"], _drift(task["cells"]), colors)),
        (
            "formats",
            "Formats over training",
            lambda: curves(task["cells"], _formats(task["cells"]), colors, shares=True),
        ),
        ("collapse", "Collapse over training", lambda: curves(task["cells"], COLLAPSE, colors)),
    ]
    for picture, title, make in plans:
        figure = make()
        if figure is not None:
            path = folder / f"{picture}.png"
            figure.savefig(path, dpi=110)
            drawn[title] = (path, _in_words(picture, name, finished))
    return drawn


def bars(rows: Rows, colors: Colors, name: str) -> Figure:
    """Draw the score of every architecture and control, with intervals and a dot per seed."""
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    figure, axes = _figure(1, height=3.4)
    width = 0.8 / len(colors)
    for number, (label, color) in enumerate(colors.items()):
        for place, architecture in enumerate(architectures):
            for row in rows:
                if (row["architecture"], row["label"]) != (architecture, label):
                    continue
                x, found = place + (number + 0.5) * width - 0.4, row["score"]
                named = label if place == _first(rows, label, architectures) else None
                axes[0].bar(x, found["mean"], width * 0.9, color=color, label=named, alpha=0.75)
                if found["half"] is not None:
                    axes[0].errorbar(x, found["mean"], found["half"], color="black", capsize=2, linewidth=1)
                axes[0].plot([x] * len(found["values"]), found["values"], ".", color="black", markersize=3)
    axes[0].set_xticks(range(len(architectures)), architectures)
    axes[0].set(ylabel=name, ylim=(0, 1))
    _legend(figure, axes)
    return figure


def curves(cells: Rows, metrics: dict[str, str], colors: Colors, shares: bool = False) -> Figure | None:
    """Draw a panel per metric and architecture with a line per control, the mean over seeds in its interval's band.

    Lines begin at the start's value if its validation logged the metric. With `shares`, axes stay between 0 and 1.
    """
    cells = [cell for cell in cells if cell["status"] == "finished"]
    starts = {(cell["architecture"], cell["seed"]): cell["last"] for cell in cells if cell["label"] == START}
    cells = [cell for cell in cells if cell["label"] != START]
    architectures = list(dict.fromkeys(cell["architecture"] for cell in cells))
    panels = [
        (metric, architecture)
        for metric in metrics
        for architecture in architectures
        if any(metric in cell["curves"] for cell in cells if cell["architecture"] == architecture)
    ]
    if not panels:
        return None
    figure, all_axes = _figure(len(panels))
    for axes, (metric, architecture) in zip(all_axes, panels, strict=True):
        for label, color in colors.items():
            group = [c for c in cells if (c["architecture"], c["label"]) == (architecture, label)]
            runs = [_points(c, metric, starts) for c in group if metric in c["curves"]]
            _band(axes, runs, color, label)
        axes.set(title=architecture, xlabel=STEPS, ylabel=metrics[metric])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if shares:
            low, high = axes.get_ylim()
            missing = max(0, LEAST_RANGE - (high - low)) / 2  # avoids magnifying curves that hardly move
            axes.set_ylim(max(low - missing, 0), min(high + missing, 1.02))  # leaves room for the line's width
    _legend(figure, all_axes)
    return figure


def _points(cell: dict[str, Any], metric: str, starts: dict[tuple[str, int], dict[str, float]]) -> dict[int, float]:
    """Return a cell's metric by the number of batches of prompts seen, beginning at 0 with the start's value."""
    start = starts.get((cell["architecture"], cell["seed"]), {})
    first = {0: start[metric]} if metric in start else {}
    return first | {step + 1: value for step, value in cell["curves"][metric]}


def by_column(rows: Rows, colors: Colors) -> Figure | None:
    """Draw accuracy by each column that was logged, with a panel per architecture and a line per control."""
    panels = [
        (column, architecture)
        for column in columns_of(rows)
        for architecture in dict.fromkeys(row["architecture"] for row in rows if by_value(row, column))
    ]
    if not panels:
        return None
    figure, all_axes = _figure(len(panels))
    for axes, (column, architecture) in zip(all_axes, panels, strict=True):
        for row in rows:
            found = by_value(row, column)
            if row["architecture"] != architecture or not found:
                continue
            places = [float(value) for value in found] if column == CLOSED else list(found)
            means = [score["mean"] for score in found.values()]
            halves = [score["half"] or 0.0 for score in found.values()]
            label, color = row["label"], colors[row["label"]]
            axes.errorbar(places, means, halves, marker="o", capsize=2, color=color, label=label, markersize=4)
        name = "share of closed units" if column == CLOSED else column
        axes.set(title=architecture, xlabel=name, ylabel="held-out accuracy", ylim=(0, 1))
    _legend(figure, all_axes)
    return figure


def _drift(cells: Rows) -> dict[str, str]:
    """Return the metrics that AttentionDrift logged, with their axis labels."""
    logged = dict.fromkeys(name for cell in cells for name in cell.get("curves", ()))
    return {
        name: words for end, words in DRIFT.items() for name in logged if name.startswith("val/") and name.endswith(end)
    }


def _formats(cells: Rows) -> dict[str, str]:
    """Return the format shares, pass@k and maj@k that FormatWatch logged, with their axis labels."""
    names = dict.fromkeys(name for cell in cells for name in cell.get("curves", ()))
    shares = {name: f"share of {name.rsplit('/', 1)[1]}" for name in names if name.startswith("val/format/share/")}
    if not shares:
        return {}
    return shares | {name: name.removeprefix("val/") for name in names if name.startswith(("val/pass@", "val/maj@"))}


def _band(axes: Axes, runs: list[dict[int, float]], color: Color, label: str) -> None:
    """Draw the mean of several curves and its interval at the steps that all curves share."""
    if not runs:
        return
    steps = sorted(set.intersection(*map(set, runs)))
    points = [mean_interval([run[step] for run in runs]) for step in steps]
    axes.plot(steps, [mean for mean, _ in points], "o-", color=color, label=label, markersize=3)
    if all(half is not None for _, half in points):
        low = [mean - (half or 0) for mean, half in points]
        high = [mean + (half or 0) for mean, half in points]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def _figure(panels: int, height: float = 2.8) -> tuple[Figure, list[Axes]]:
    columns = min(panels, 2)
    lines = -(-panels // columns)
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)  # separates a row's labels from the next row's titles
    figure = Figure(figsize=(4.2 * columns if panels > 1 else 7.5, height * lines), layout=layout)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    for each in axes[:panels]:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes[:panels]


def _legend(figure: Figure, all_axes: list[Axes]) -> None:
    """Draw one legend below all panels, with one entry per colour."""
    named: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _color(number: int) -> Color:
    """Return one of ten colours, followed by ten lighter ones."""
    return colormaps["tab20"](2 * number % 20 + number // 10 % 2)


def _first(rows: Rows, label: str, architectures: list[str]) -> int:
    """Return the index of the first architecture with this control, whose bar goes into the legend."""
    return min(architectures.index(row["architecture"]) for row in rows if row["label"] == label)


def _in_words(picture: str, name: str, rows: Rows) -> str:
    """Return a figure's alternative text; the report's tables hold all numbers."""
    shown = "; ".join(f"{r['architecture']} {r['label']} {100 * r['score']['mean']:.0f} %" for r in rows)
    kinds = {
        "score": f"Bar chart of held-out {name}: ",
        "curves": f"Held-out {name} over training; final values: ",
        "by_column": "Held-out accuracy by a column of the examples; overall: ",
        "attention": f"Attention over training; final {name}: ",
        "formats": f"Shares of answer formats, pass@k and maj@k over training; final {name}: ",
        "collapse": f"Diversity of formats and attention over training; final {name}: ",
    }
    return kinds[picture] + shown
