"""The report's pictures, drawn from what results.json holds."""

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
from .results import metric_name

Rows = list[dict[str, Any]]
Color = tuple[float, ...]
Colors = dict[str, Color]  # of controls
DRIFT = {
    "divergence_from_start": "divergence from the start, nats",
    "effective_span": "effective span, tokens",
    "mean_distance": "mean distance, tokens",
    "allocation/memory": "share of attention on memory",
}
COLLAPSE = {
    "val/format/entropy": "entropy of formats, nats",
    "collapse/diversity": "attention's diversity, nats",
    "collapse/distinct_patterns": "ways of attending in a group",
}
STEPS = "batches of prompts"
LEAST_RANGE = 0.1  # of an axis of shares


def draw_all(task: dict[str, Any], folder: Path) -> dict[str, tuple[Path, str]]:
    """Write the pictures of a task; by title, each one's file and what it shows in words."""
    drawn: dict[str, tuple[Path, str]] = {}
    finished = [row for row in task["summary"] if "score" in row]
    if not finished:
        return drawn
    folder.mkdir(parents=True, exist_ok=True)
    name, labels = metric_name(task), dict.fromkeys(row["label"] for row in finished)
    metric = {task["metric"]: f"held-out {name}"}
    colors = {label: _color(number) for number, label in enumerate(labels)}  # the same in all pictures
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
    """The score of every architecture and control, with intervals and each seed as a dot."""
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
    """A panel for every metric and architecture, a line for every control: mean over seeds, its interval as a band.

    Lines begin at the start's value, where its validation has one.
    `shares` lie between 0 and 1, whatever an interval says.
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
            missing = max(0, LEAST_RANGE - (high - low)) / 2  # curves that do not move, by an axis of thousandths
            axes.set_ylim(max(low - missing, 0), min(high + missing, 1.02))  # the line's own width above
    _legend(figure, all_axes)
    return figure


def _points(cell: dict[str, Any], metric: str, starts: dict[tuple[str, int], dict[str, float]]) -> dict[int, float]:
    """A metric of a cell by the batches of prompts that were learnt from, none at the start."""
    start = starts.get((cell["architecture"], cell["seed"]), {})
    first = {0: start[metric]} if metric in start else {}
    return first | {step + 1: value for step, value in cell["curves"][metric]}


def by_column(rows: Rows, colors: Colors) -> Figure | None:
    """Accuracy by a column of the examples, a panel for every architecture, a line for every control."""
    rows = [row for row in rows if row["accuracy_at"]]
    if not rows:
        return None
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    figure, all_axes = _figure(len(architectures))
    for axes, architecture in zip(all_axes, architectures, strict=True):
        for row in rows:
            if row["architecture"] != architecture:
                continue
            names = sorted(row["accuracy_at"], key=_value_of)
            means = [row["accuracy_at"][name]["mean"] for name in names]
            halves = [row["accuracy_at"][name]["half"] or 0.0 for name in names]
            places = [str(_value_of(name)[1]) for name in names]
            label, color = row["label"], colors[row["label"]]
            axes.errorbar(places, means, halves, marker="o", capsize=2, color=color, label=label, markersize=4)
        axes.set(title=architecture, xlabel=names[0].split("=")[0], ylabel="held-out accuracy", ylim=(0, 1))
    _legend(figure, all_axes)
    return figure


def _drift(cells: Rows) -> dict[str, str]:
    """What AttentionDrift logged, of the layers that it looked at."""
    logged = dict.fromkeys(name for cell in cells for name in cell.get("curves", ()))
    return {
        name: words for end, words in DRIFT.items() for name in logged if name.startswith("val/") and name.endswith(end)
    }


def _formats(cells: Rows) -> dict[str, str]:
    """What FormatWatch logged but for the formats' entropy: shares, and what several answers are good for."""
    names = dict.fromkeys(name for cell in cells for name in cell.get("curves", ()))
    shares = {name: f"share of {name.rsplit('/', 1)[1]}" for name in names if name.startswith("val/format/share/")}
    if not shares:
        return {}
    return shares | {name: name.removeprefix("val/") for name in names if name.startswith(("val/pass@", "val/maj@"))}


def _band(axes: Axes, runs: list[dict[int, float]], color: Color, label: str) -> None:
    """The mean of several curves and its interval, where all of them have a point."""
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
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)  # room between a row's labels and the next one's titles
    figure = Figure(figsize=(4.2 * columns if panels > 1 else 7.5, height * lines), layout=layout)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    for each in axes[:panels]:
        each.grid(alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes[:panels]


def _legend(figure: Figure, all_axes: list[Axes]) -> None:
    """One legend below all panels, a name for each colour."""
    named: dict[str, Any] = {}
    for axes in all_axes:
        handles, labels = axes.get_legend_handles_labels()
        named.update(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _color(number: int) -> Color:
    """Ten colours, and then ten lighter ones."""
    return colormaps["tab20"](2 * number % 20 + number // 10 % 2)


def _first(rows: Rows, label: str, architectures: list[str]) -> int:
    """The place of the first bar of a control: it alone is named in the legend."""
    return min(architectures.index(row["architecture"]) for row in rows if row["label"] == label)


def _value_of(name: str) -> tuple[float, str]:
    """The value in "column=value", numbers in their order."""
    value = name.split("=", 1)[1]
    return (float(value) if value.replace(".", "", 1).isdigit() else 0.0, value)


def _in_words(picture: str, name: str, rows: Rows) -> str:
    """What a picture shows, for those who do not see it; the tables beside it have the figures."""
    shown = "; ".join(f"{r['architecture']} {r['label']} {100 * r['score']['mean']:.0f} %" for r in rows)
    kinds = {
        "score": f"Bars of held-out {name}: ",
        "curves": f"Held-out {name} over training, ending at: ",
        "by_column": "Held-out accuracy by a column of the examples; overall: ",
        "attention": f"How attention moved in training; {name} at its end: ",
        "formats": f"Shares of answer formats, pass@k and maj@k over training; {name} at its end: ",
        "collapse": f"Variety of formats and of attention over training; {name} at its end: ",
    }
    return kinds[picture] + shown
