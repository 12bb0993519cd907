"""Issues of real repositories in SWE-bench's format, each with a container and tests."""

import json
import shlex
from typing import Any

import numpy as np

from hybridmem.checks import at_least, between_0_and_1, number_held_out
from hybridmem.rl.environments.docker import DIRECTORY, Container

from .task import Split, example_generator

IMAGE = "swebench/sweb.eval.x86_64.{instance}:latest"
TEST_COMMAND = "source /opt/miniconda3/bin/activate testbed && python -m pytest -q {tests}"
NEEDED = ("instance_id", "problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS")
PROMPT = """Solve this issue of the repository in the current folder. Call one tool at a time, like this:
<tool_call>{{"name": "bash", "arguments": {{"command": "ls"}}}}</tool_call>
The tools are bash(command), open(path, line), edit(path, line, text), which replaces a line, test() and submit().

{problem_statement}
"""


class SWEBench:
    """Issues in Docker containers: the policy reads and edits a repository, and the reward is 1 if all tests pass.

    Rows come from a dataset on the Hugging Face hub or from files, with SWE-bench's columns: instance_id,
    problem_statement, FAIL_TO_PASS, PASS_TO_PASS and optionally test_patch, image and test_command. Rows without a
    test_command run their tests with pytest, which fits most of SWE-bench's repositories, but not Django and SymPy.

    Needs datasets (`pip install hybridmem[data]`), the docker command, and disk space for the images.

    Args:
        dataset: a name on the hub, or json for files.
        split: the split of the dataset.
        data_files: the files to read with json.
        image: the name of a row's image; a format string with {instance}, the instance_id in the form of SWE-bench's
            image names, and any column.
        test_command: a format string with {tests}, the names of the tests.
        directory: the folder of the repository in the image.
        prompt: a format string with {problem_statement}; double other braces.
        max_completion_length: the maximum number of tokens in a trajectory.
        val_fraction: the fraction of rows to hold out.
        seed: seeds the split and all examples.

    Raises:
        ImportError: datasets is not installed.
        ValueError: A column is missing, or too few rows are left.
    """

    environment = Container

    def __init__(
        self,
        dataset: str = "SWE-bench/SWE-bench_Verified",
        split: str = "test",
        data_files: str | None = None,
        image: str = IMAGE,
        test_command: str = TEST_COMMAND,
        directory: str = DIRECTORY,
        prompt: str = PROMPT,
        max_completion_length: int = 32_768,
        val_fraction: float = 0.1,
        seed: int = 0,
    ):
        at_least(1, max_completion_length=max_completion_length)
        at_least(0, seed=seed)
        between_0_and_1(val_fraction=val_fraction)
        self.image, self.test_command, self.directory, self.prompt = image, test_command, directory, prompt
        self.max_completion_length, self.seed = max_completion_length, seed
        rows = read_rows(dataset, split, data_files)
        held_out = number_held_out(val_fraction, len(rows), "rows")
        order = np.random.default_rng((seed,)).permutation(len(rows)).tolist()
        chosen = [rows[number] for number in order]
        self.rows: dict[Split, list[dict[str, Any]]] = {"train": chosen[held_out:], "val": chosen[:held_out]}

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return {"prompt", "answer", "image", "test_command", "test_patch", "directory", "instance_id"}."""
        rng = example_generator(self.seed, split, index)
        row = self.rows[split][rng.integers(len(self.rows[split]))]
        tests = [*as_list(row["FAIL_TO_PASS"]), *as_list(row["PASS_TO_PASS"])]
        command = row.get("test_command") or self.test_command.format(tests=shlex.join(tests))
        instance = row["instance_id"].lower().replace("__", "_1776_")  # Docker forbids double underscores
        return {
            "prompt": self.prompt.format(**row),
            "answer": "submit",
            "image": self.image.format(instance=instance, **row),
            "test_command": command,
            "test_patch": row.get("test_patch") or "",
            "directory": self.directory,
            "instance_id": row["instance_id"],
        }

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return the environments' rewards: 1 if all tests pass, else 0."""
        return [environment.get_reward() for environment in columns["environments"]]


def read_rows(dataset: str, split: str, data_files: str | None) -> list[dict[str, Any]]:
    """Read all rows of a dataset.

    Raises:
        ImportError: datasets is not installed.
        ValueError: A column is missing.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ImportError("SWEBench needs datasets: pip install hybridmem[data]") from error
    rows = [dict(row) for row in load_dataset(dataset, split=split, data_files=data_files)]
    missing = [name for name in NEEDED if rows and name not in rows[0]]
    if missing:
        raise ValueError(
            f"dataset={dataset!r} lacks the columns {', '.join(missing)}; choose a dataset with them (it has "
            f"{', '.join(rows[0])})"
        )
    return rows


def as_list(tests: str | list[str]) -> list[str]:
    """Return test names as a list, which SWE-bench stores as a JSON string."""
    return json.loads(tests) if isinstance(tests, str) else list(tests)
