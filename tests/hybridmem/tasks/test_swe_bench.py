"""Examples from SWE-bench's rows in a local file."""

import json

import pytest

from hybridmem.tasks import SWEBench, Task

pytest.importorskip("datasets")


def row(number: int, **columns) -> dict:
    return {
        "instance_id": f"Owner__name-{number}",
        "problem_statement": f"It is {{wrong}} {number}.",
        "FAIL_TO_PASS": json.dumps([f"tests/test_a.py::test_{number}", "tests/test_a.py::test[a b]"]),
        "PASS_TO_PASS": json.dumps(["tests/test_b.py"]),
        "test_patch": "a patch",
        **columns,
    }


def task_of(tmp_path, rows, **settings) -> SWEBench:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SWEBench(dataset="json", split="train", data_files=str(file), val_fraction=0.3, **settings)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_examples_have_all_arguments_of_a_container(tmp_path):
    task = task_of(tmp_path, [row(n) for n in range(10)])
    assert isinstance(task, Task)
    example = task.example("train", 0)
    number = example["instance_id"].removeprefix("Owner__name-")
    assert example["image"] == f"swebench/sweb.eval.x86_64.owner_1776_name-{number}:latest"
    assert example["prompt"].endswith(f"It is {{wrong}} {number}.\n")
    assert '<tool_call>{"name": "bash"' in example["prompt"]
    assert example["test_command"].endswith(
        f"python -m pytest -q tests/test_a.py::test_{number} 'tests/test_a.py::test[a b]' tests/test_b.py"
    )
    assert (example["test_patch"], example["directory"]) == ("a patch", "/testbed")
    seen = {split: {task.example(split, n)["instance_id"] for n in range(60)} for split in ("train", "val")}
    assert (len(seen["train"]), len(seen["val"])) == (7, 3)
    assert not seen["train"] & seen["val"]


def test_rows_can_bring_their_image_and_command(tmp_path):
    rows = [row(n, docker_image=f"mine:{n}", test_command="make test", FAIL_TO_PASS=["a"]) for n in range(5)]
    example = task_of(tmp_path, rows, image="{docker_image}").example("val", 1)
    assert example["image"].startswith("mine:")
    assert example["test_command"] == "make test"


def test_a_missing_column_is_named(tmp_path):
    rows = [{"instance_id": "a", "problem_statement": "b"}] * 4
    with pytest.raises(
        ValueError, match=r"lacks the columns FAIL_TO_PASS, PASS_TO_PASS; .*it has instance_id, problem"
    ):
        task_of(tmp_path, rows)
