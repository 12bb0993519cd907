"""Verdicts of the report follow from the numbers, and its page is self-contained and escapes all text."""

import re
from html.parser import HTMLParser

import pytest

from hybridmem.compare.answer import answer, difference
from hybridmem.compare.figures import by_column
from hybridmem.compare.report import write_report
from hybridmem.compare.results import summarise

RISE = [[9, 0.4], [19, 0.6]]


def cell(architecture, label, seed, accuracy, status="finished", reason=None):
    found = {
        "architecture": architecture,
        "label": label,
        "control": label,
        "target": "",
        "seed": seed,
        "status": status,
        "reason": reason,
        "folder": f"{architecture}/{label}/{seed}",
        "masked": False,
        "without": {"token + attention": "token", "attention": "start"}.get(label),
    }
    if status == "finished":
        last = {"val/accuracy": accuracy, "val/pass@1": accuracy / 2, "val/accuracy_at/distance=3": accuracy}
        curves = {"val/accuracy": RISE, "val/attention/layer_1/effective_span": RISE}
        compute = dict(seconds=2.0, tokens=100, flops=1e9, steps=10, parameters=1000)
        found |= {"last": last, "curves": curves, "compute": compute, "environment": 0}
    return found


def results(cells, warm_ups=()):
    task = {"metric": "val/accuracy", "cells": cells, "summary": summarise(cells), "warm_ups": list(warm_ups)}
    return {"tasks": {"recall": task}, "command": "hybridmem compare", "environments": [{"cores": 2}]}


THREE = [
    cell(architecture, label, seed, accuracy + 0.01 * seed)
    for architecture, offset in (("swa", 0.0), ("mag", 0.3))
    for label, accuracy in (("start", 0.1 + offset), ("token", 0.2 + offset), ("token + attention", 0.2 + offset))
    for seed in range(3)
]


def test_gains_are_paired_by_seed():
    rows = {(row["architecture"], row["label"]): row for row in summarise(THREE)}
    gain = rows["mag", "token"]["gain"]
    assert gain["mean"] == pytest.approx(0.1)
    assert gain["half"] == pytest.approx(0.0, abs=1e-12)  # all seeds gain the same
    # mean 0.51, standard deviation 0.01, t = 4.303
    assert rows["mag", "token"]["score"]["half"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.10, 0.12, 0.11], "+11.0 ± 2.5 points over 3 seeds"),
        ([0.10, -0.10, 0.02], "not a significant difference"),
        ([0.1], "+10.0 points (one seed, so no interval)"),
    ],
)
def test_differences_have_intervals_over_seeds(values, words):
    assert words in difference(values)


def test_the_answer_names_the_winner_and_the_gain_of_attention():
    first, second = answer(results(THREE)["tasks"]["recall"])
    assert "The best result is mag with token" in first
    assert "+30.0 ± 0.0 points over 3 seeds" in first
    assert "attention reward added to token changes accuracy by +0.0 ± 0.0" in second


def test_scores_of_unchanged_prompts_are_shown_if_logged(tmp_path):
    cells = [
        found | {"last": {"val/ndcg@10": 0.4, "val/prompt/ndcg@10": 0.346, "val/pass@1": 0.1}, "curves": {}}
        for found in THREE
    ]
    task = {"metric": "val/ndcg@10", "cells": cells, "summary": summarise(cells, "val/ndcg@10"), "warm_ups": []}
    assert "ndcg@10 40.0 ± 0.0 %, compared with 34.6 % for the unchanged prompts" in answer(task)[0]
    page = write_report({"tasks": {"query": task}, "command": "", "environments": [{}]}, tmp_path).read_text()
    assert "unchanged prompts</td><td>34.6</td>" in page
    assert "unchanged prompts" not in write_report(results(THREE), tmp_path).read_text()


def test_controls_that_add_the_same_kind_are_distinguished():
    more = [cell("mag", "weight 10", seed, 0.55 + 0.01 * seed) | {"without": "token"} for seed in range(3)]
    second = answer(results([*THREE, *more])["tasks"]["recall"])[1]
    assert "added to token, as in 'token + attention', changes accuracy by +0.0" in second
    assert "added to token, as in 'weight 10', changes accuracy by +5.0" in second


def test_a_cell_with_fewer_seeds_does_not_win():
    lucky = cell("full", "token", 0, 0.99)
    assert answer(results([*THREE, lucky])["tasks"]["recall"]) == answer(results(THREE)["tasks"]["recall"])


def test_a_grid_without_reward_on_attention_compares_controls():
    scores = {"start": 0.2, "GRPO": 0.4, "Critique-GRPO": 0.5}
    cells = [cell("mag", label, seed, score + 0.01 * seed) for label, score in scores.items() for seed in range(3)]
    _, second = answer(results(cells)["tasks"]["recall"])
    assert second == "On mag, it leads GRPO by +10.0 ± 0.0 points over 3 seeds."
    only = [each for each in cells if each["label"] == "GRPO"]
    assert len(answer(results(only)["tasks"]["recall"])) == 1


def test_a_report_without_finished_runs():
    assert answer(results([cell("mag", "token", 0, 0, status="missing")])["tasks"]["recall"]) == [
        "No cell has finished yet."
    ]


class Page(HTMLParser):
    """Collector of a page's tags and attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_shows_failures_as_text(tmp_path):
    bad = cell("mag", "attention", 0, 0, status="failed", reason='<script>alert(1)</script> "><img src=x onerror=y>')
    path = write_report(results([*THREE, bad]), tmp_path, other=results(THREE))
    page = Page(path.read_text())
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 4
    assert all(image["alt"] and image["src"].startswith("data:image/png") for image in images)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not re.search(r"https?://", path.read_text())
    assert "&lt;script&gt;" in path.read_text()
    assert sorted(file.name for file in tmp_path.rglob("*.png")) == [
        "attention.png",
        "by_column.png",
        "curves.png",
        "score.png",
    ]


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</title></style></pre><iframe src=https://example.com>",
    '<a href="javascript:alert(1)">x</a><base href=//example.com>',
    "&lt;script&gt;<!--",
)


def test_hostile_names_and_answers_stay_text(tmp_path):
    """Text of models, errors and users is shown but never executed, and the page fetches nothing."""
    everything = " ".join(HOSTILE)
    script = HOSTILE[0]
    cells = [cell(script, label, seed, 0.5) for label in (script, "start") for seed in range(2)]
    cells += [
        cell("mag", everything, 0, 0, status="failed", reason=text.replace("alert", f"alert{n}"))
        for n, text in enumerate(HOSTILE)
    ]
    found = results(cells, [cell(everything, "", 0, 0, status="missing")])
    found |= {"command": everything, "environments": [{everything: everything}], "configuration": [everything]}
    for row in found["tasks"]["recall"]["summary"]:
        share = {"mean": 0.5, "half": None, "values": [0.5]}
        row |= {"sparsity": share, "sparsity_by_kind": {everything: share}, "overlap": None}
    text = write_report(found, tmp_path, other=found).read_text()
    page = Page(text)
    plain = {"script", "iframe", "svg", "a", "base", "object", "embed", "form"}
    assert not plain & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("src", "data:").startswith("data:"), tag
        assert attributes.get("href", "data:").startswith("data:"), tag
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 5


def test_weight_changes_are_shown_by_kind_of_tensor(tmp_path):
    found = results(THREE)
    for row in found["tasks"]["recall"]["summary"]:
        if row["label"] != "start":
            share = {"mean": 0.5, "half": None, "values": [0.5]}
            row |= {"sparsity": share, "sparsity_by_kind": {"mlp.up_proj.weight": share}, "overlap": None}
    text = write_report(found, tmp_path).read_text()
    assert "unchanged in mag" in text
    assert "<td>mlp.up_proj.weight</td><td>50.0</td><td>50.0</td>" in text


def test_formats_and_their_collapse_are_drawn(tmp_path):
    cells = [cell("mag", label, 0, 0.5) for label in ("start", "token")]
    for each in cells:
        each["curves"] |= {"val/format/share/code": RISE, "val/pass@8": RISE, "collapse/diversity": RISE}
    write_report(results(cells), tmp_path)
    drawn = {file.name for file in tmp_path.rglob("*.png")}
    assert {"formats.png", "collapse.png"} <= drawn


def test_accuracy_by_closed_share_is_drawn_and_listed(tmp_path):
    cells = [cell("memory", label, seed, 0.5) for label in ("start", "reward", "random heads") for seed in range(2)]
    for each in cells:
        del each["last"]["val/accuracy_at/distance=3"]
        if each["label"] != "start":
            each["last"] |= {f"val/accuracy_at/closed={share}": 1 - float(share) for share in ("1", "0", "0.95", "0.5")}
    text = write_report(results(cells), tmp_path).read_text()
    table = text.split("<h3>Accuracy by closed</h3>")[1].split("</table>")[0]
    assert re.findall("<th[^>]*>([^<]*)</th>", table) == ["architecture", "control", "0", "0.5", "0.95", "1"]
    rows = [re.findall("<td>([^<]*)</td>", row) for row in re.findall("<tr><td>.*?</tr>", table)]
    shares = ["100.0 ± 0.0", "50.0 ± 0.0", "5.0 ± 0.0", "0.0 ± 0.0"]
    assert rows == [["memory", label, *shares] for label in ("reward", "random heads")]
    assert (tmp_path / "figures" / "recall" / "by_column.png").exists()


def test_panels_are_by_column_and_architecture():
    cells = [cell(architecture, "reward", 0, 0.5) for architecture in ("window", "memory")]
    for each in cells:
        each["last"] |= {"val/accuracy_at/closed=0.9": 0.4, "val/accuracy_at/closed=0.95": 0.2}
    figure = by_column(summarise(cells), {"reward": (0.0, 0.0, 0.0)})
    found = [(axes.get_title(), axes.get_xlabel()) for axes in figure.axes]
    assert found == [
        ("window", "share of closed units"),
        ("memory", "share of closed units"),
        ("window", "distance"),
        ("memory", "distance"),
    ]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0.9, 0.95]
