"""Answer in two sentences: the best architecture, and the effect of attention reward or of the best control."""

from typing import Any

from hybridmem.metrics.interval import mean_interval

from .grid import START
from .results import metric_name, of_prompts, paired

Cells = list[dict[str, Any]]


def answer(task: dict[str, Any]) -> list[str]:
    """Return up to two sentences about a task in results.json, with results and intervals."""
    cells = [cell for cell in task["cells"] if cell["status"] == "finished"]
    trained = [row for row in task["summary"] if "score" in row and row["label"] != START]
    if not trained:
        return ["No cell has finished yet."]
    most = max(len(row["seeds"]) for row in trained)  # ignore cells with fewer seeds, which may just be lucky
    trained = [row for row in trained if len(row["seeds"]) == most]
    best = max(trained, key=lambda row: row["score"]["mean"])
    first = _architecture(task, cells, trained, best)
    if any(cell["without"] for cell in task["cells"]):
        return [first, _attention(task, cells, best["architecture"])]
    return [first, *_control(task, cells, trained, best)]


def difference(values: list[float]) -> str:
    """Format the difference between two cells over seeds, in percentage points, with its significance."""
    mean, half = mean_interval([100 * value for value in values])
    if half is None:
        return f"{mean:+.1f} points (one seed, so no interval)"
    verdict = "" if abs(mean) > half else ", not a significant difference"
    return f"{mean:+.1f} ± {half:.1f} points over {len(values)} seeds{verdict}"


def percent(interval: dict[str, Any] | None, signed: bool = False) -> str:
    """Format a share and its interval in percent."""
    if interval is None:
        return ""
    mean = f"{100 * interval['mean']:{'+' if signed else ''}.1f}"
    return mean if interval["half"] is None else f"{mean} ± {100 * interval['half']:.1f}"


def _architecture(task: dict[str, Any], cells: Cells, trained: Cells, best: dict[str, Any]) -> str:
    name = metric_name(task)
    score = f"{percent(best['score'])} % right" if name == "accuracy" else f"{name} {percent(best['score'])} %"
    text = f"The best result is {best['architecture']} with {best['label']}: {score}"
    prompts = of_prompts(task)
    if prompts is not None:
        text += f", compared with {percent(prompts)} % for the unchanged prompts"
    rivals = [row for row in trained if row["architecture"] != best["architecture"]]
    if not rivals:
        return text + "."
    rival = max(rivals, key=lambda row: row["score"]["mean"])
    theirs, its = (_of(cells, row["architecture"], row["label"]) for row in (rival, best))
    ahead = paired(theirs, its, task["metric"])
    if not ahead:
        return text + f"; {rival['architecture']} shares no seed with it."
    return text + (
        f"; the best other architecture is {rival['architecture']} with {rival['label']} ({percent(rival['score'])} "
        f"%): {difference(ahead)}."
    )


def _control(task: dict[str, Any], cells: Cells, trained: Cells, best: dict[str, Any]) -> list[str]:
    """Compare the best control with the second best, in a grid without attention reward."""
    architecture = best["architecture"]
    rivals = [row for row in trained if row["architecture"] == architecture and row is not best]
    if not rivals:
        return []
    rival = max(rivals, key=lambda row: row["score"]["mean"])
    theirs, its = (_of(cells, architecture, row["label"]) for row in (rival, best))
    ahead = paired(theirs, its, task["metric"])
    return [f"On {architecture}, it leads {rival['label']} by {difference(ahead)}."] if ahead else []


def _attention(task: dict[str, Any], cells: Cells, architecture: str) -> str:
    """Compare AttentionRL, with its best target, to the same objectives without it."""
    cells = [cell for cell in cells if cell["architecture"] == architecture and not cell["masked"]]
    found = []
    pairs = dict.fromkeys((cell["control"], cell["without"]) for cell in cells if cell["without"])
    alike = [without for _, without in pairs]
    for control, without in pairs:
        candidates = {cell["label"] for cell in cells if cell["control"] == control}
        before = _of(cells, architecture, without)
        gains = [paired(before, _of(cells, architecture, label), task["metric"]) for label in candidates]
        gains = [gain for gain in gains if gain]
        if gains:
            best = max(gains, key=lambda gain: sum(gain) / len(gain))
            of = "" if len(gains) == 1 else f" (the best of {len(gains)} targets)"
            name = "alone" if without == START else f"added to {without}"
            name += f", as in {control!r}," if alike.count(without) > 1 else ""
            found.append(f"attention reward {name}{of} changes {metric_name(task)} by {difference(best)}")
    if not found:
        return f"The runs with attention reward on {architecture} have not finished."
    return f"On {architecture}, " + "; ".join(found) + "."


def _of(cells: Cells, architecture: str, label: str) -> Cells:
    return [cell for cell in cells if (cell["architecture"], cell["label"]) == (architecture, label)]
