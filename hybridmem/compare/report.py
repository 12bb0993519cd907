"""Self-contained HTML report of a comparison: answer, tables, figures, compute and configuration."""

import base64
import html
import json
from collections import Counter
from pathlib import Path
from typing import Any

from .answer import answer, percent
from .figures import draw_all
from .results import by_value, columns_of, metric_name, of_prompts, runs_of

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --page: #fff; --soft: #57606a; --line: #d0d7de; --box: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --page: #0d1117; --soft: #9aa4af; --line: #30363d; --box: #161b22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--page); overflow-wrap: anywhere; }
h1, h2, h3 { line-height: 1.25; }
.answer { padding: .75rem 1rem; border-left: 4px solid #0969da; background: var(--box); }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
pre { padding: .75rem; background: var(--box); white-space: pre-wrap; font-size: .85rem; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""
MAPS = "attention_maps"


def show_report(results: dict[str, Any], root: Path, other: dict[str, Any] | None = None) -> None:
    """Write the report, and print each task's answer and the report's path."""
    path = write_report(results, root, other)
    for name, task in results["tasks"].items():
        print(f"{name}: {' '.join(answer(task))}")
    print(f"report: {path}")


def write_report(results: dict[str, Any], root: Path, other: dict[str, Any] | None = None) -> Path:
    """Write report.html and its figures below `root`, and compare with the results of a second grid if given.

    All text is escaped, including models' answers and error messages.
    """
    parts = [f"<h1>Who should control attention?</h1>{_opening(results)}"]
    for name, task in results["tasks"].items():
        parts.append(_task(name, task, root))
        if other is not None:
            parts.append(_beside(task, other["tasks"].get(name)))
    parts.append(_made(results))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>hybridmem: who should control attention?</title><link rel="icon" href="data:,"><style>{STYLE}</style>'
        f"</head><body>{''.join(parts)}</body></html>\n"
    )
    path = root / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _opening(results: dict[str, Any]) -> str:
    sentences = [
        f"<p><strong>{_text(name)}.</strong> {_text(' '.join(answer(task)))}</p>"
        for name, task in results["tasks"].items()
    ]
    return f'<div class="answer">{"".join(sentences)}</div>'


def _task(name: str, task: dict[str, Any], root: Path) -> str:
    pictures = "".join(
        _picture(title, path, words) for title, (path, words) in draw_all(task, root / "figures" / name).items()
    )
    return (
        f"<h2>{_text(name)}</h2>{_grid(task)}{_problems(task)}{pictures}{_by_column(task)}{_subnetworks(task)}"
        f"{_maps(task, root)}{_compute(task)}"
    )


def _grid(task: dict[str, Any]) -> str:
    rows = [
        [
            row["architecture"],
            row["label"],
            percent(row["score"]),
            percent(row["gain"], signed=True),
            percent(row["pass@1"]),
            str(len(row["seeds"])),
        ]
        for row in task["summary"]
        if "score" in row
    ]
    prompts = of_prompts(task)
    if prompts is not None:
        rows.insert(0, ["", "unchanged prompts", percent(prompts), "", "", ""])
    name = metric_name(task)
    meant = "Accuracy is that of greedy answers. " if name == "accuracy" else ""
    note = (
        '<p class="soft">Held-out results in percent: mean over seeds ± half the width of the 95 % confidence interval '
        f"(Student's t). {meant}Gain is the difference to the start with the same seed. pass@1 is the accuracy of "
        "answers sampled as in training.</p>"
    )
    return _table(["architecture", "control", name, "gain", "pass@1", "seeds"], rows) + note


def _by_column(task: dict[str, Any]) -> str:
    """Return a table of accuracy for each column by which it was logged."""
    tables = ""
    for column in columns_of(task["summary"]):
        found = {(row["architecture"], row["label"]): by_value(row, column) for row in task["summary"]}
        values = dict.fromkeys(value for scores in found.values() for value in scores)
        rows = [
            [architecture, label, *(percent(scores.get(value)) for value in values)]
            for (architecture, label), scores in found.items()
            if scores
        ]
        tables += f"<h3>Accuracy by {_text(column)}</h3>" + _table(["architecture", "control", *values], rows)
    return tables


def _problems(task: dict[str, Any]) -> str:
    runs = runs_of(task)
    failed = [
        f"<li>{_text(_named(run))}: {_text(run['reason'] or '')}</li>" for run in runs if run["status"] == "failed"
    ]
    missing = [_named(run) for run in runs if run["status"] == "missing"]
    text = f"<h3>Failed</h3><ul>{''.join(failed)}</ul>" if failed else ""
    if not missing:
        return text
    count = f"{len(missing)} of {len(runs)} runs have not finished"
    return text + f'<details class="soft"><summary>{count}</summary>{_text(", ".join(missing))}.</details>'


def _subnetworks(task: dict[str, Any]) -> str:
    rows = [
        [row["architecture"], row["label"], percent(row["sparsity"]), _overlap(row.get("overlap"))]
        for row in task["summary"]
        if row.get("sparsity")
    ]
    if not rows:
        return ""
    note = (
        '<p class="soft">Unchanged: share of weights within 1e-5 of the start, in bfloat16. Shared: share of a seed\'s '
        "changed weights that all seeds change, with the share expected by chance.</p>"
    )
    head = ["architecture", "control", "unchanged", "shared"]
    return "<h3>Weights changed by training</h3>" + _table(head, rows) + note + _by_kind(task)


def _by_kind(task: dict[str, Any]) -> str:
    """Return tables of unchanged weights by kind of tensor, one per architecture."""
    by_architecture: dict[str, dict[str, dict[str, Any]]] = {}
    for row in task["summary"]:
        if "sparsity_by_kind" in row:
            by_architecture.setdefault(row["architecture"], {})[row["label"]] = row["sparsity_by_kind"]
    tables = ""
    for architecture, controls in by_architecture.items():
        kinds = dict.fromkeys(kind for shares in controls.values() for kind in shares)
        rows = [[kind, *(percent(shares.get(kind)) for shares in controls.values())] for kind in kinds]
        tables += _table([f"unchanged in {architecture}", *controls], rows)
    return f"<details><summary>Unchanged weights by kind of tensor</summary>{tables}</details>" if tables else ""


def _overlap(overlap: dict[str, float] | None) -> str:
    return "" if overlap is None else f"{100 * overlap['shares']:.1f} (chance {100 * overlap['chance']:.1f})"


def _maps(task: dict[str, Any], root: Path) -> str:
    """Return heat maps of one prompt before and after training, from each cell's first seed with maps."""
    shown, seen = "", set()
    for cell in task["cells"]:
        key = (cell["architecture"], cell["label"])
        files = sorted((root / cell["folder"] / MAPS).glob("*.png"), key=lambda file: int(file.stem.split("_")[-1]))
        if key in seen or len(files) < 2:
            continue
        seen.add(key)
        for when, file in (("before", files[0]), ("after", files[-1])):
            title = f"{cell['architecture']}, {cell['label']}, {when} training"
            shown += _picture(title, file, f"Heat map of the attention of answer tokens in one prompt: {title}")
    if not shown:
        return ""
    return f"<h3>Attention maps</h3><details><summary>Answers to one held-out prompt</summary>{shown}</details>"


def _compute(task: dict[str, Any]) -> str:
    rows = [
        [
            row["architecture"],
            row["label"],
            f"{row['compute']['seconds']:,.0f}",
            f"{row['compute']['tokens']:,.0f}",
            f"{row['compute']['flops'] / 1e9:,.1f}",
            f"{row['compute']['steps']:,.0f}",
            f"{row['compute']['parameters']:,.0f}",
        ]
        for row in task["summary"]
        if row.get("compute")
    ]
    head = ["architecture", "control", "seconds", "tokens read", "GFLOP", "steps", "parameters"]
    return "<h3>Compute per run</h3>" + _table(head, rows) if rows else ""


def _beside(task: dict[str, Any], other: dict[str, Any] | None) -> str:
    """Return a table of the scores of cells that both grids have."""
    theirs = {(r["architecture"], r["label"]): r for r in (other or {"summary": []})["summary"] if "score" in r}
    rows = [
        [row["architecture"], row["label"], percent(row["score"]), percent(theirs[key]["score"])]
        for row in task["summary"]
        if "score" in row and (key := (row["architecture"], row["label"])) in theirs
    ]
    if not rows:
        return '<p class="soft">The two grids have no cell of this task in common.</p>'
    return "<h3>Comparison of two grids</h3>" + _table(["architecture", "control", "this grid", "other grid"], rows)


def _made(results: dict[str, Any]) -> str:
    return (
        f"<h2>Reproduction</h2><pre>{_text(results['command'])}</pre>{_made_with(results)}"
        "<details><summary>Configuration</summary><pre>"
        f"{_text(json.dumps(results.get('configuration'), indent=1))}</pre></details>"
    )


def _made_with(results: dict[str, Any]) -> str:
    """Return versions and machines, several if the grid ran in parts."""
    runs = (run for task in results["tasks"].values() for run in runs_of(task))
    counts = Counter(run["environment"] for run in runs if run["status"] == "finished")
    text = ""
    for number, environment in enumerate(results["environments"]):
        of_runs = f"{counts[number]} runs" if counts[number] > 1 else "1 run"
        record = "not recorded" if environment is None else json.dumps(environment, indent=1)
        text += f"<details><summary>Versions and machine of {of_runs}</summary><pre>{_text(record)}</pre></details>"
    return text


def _picture(title: str, path: Path, words: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{_text(words)}" src="data:image/png;base64,{data}">'
        f'<figcaption class="soft">{_text(title)}</figcaption></figure>'
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    heads = "".join(f'<th scope="col">{_text(name)}</th>' for name in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _named(run: dict[str, Any]) -> str:
    return f"{run['architecture']} {run['label'] or 'warm-up'} seed {run['seed']}"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
