"""Train by reward what docs/results.md reports, and write its tables.

    python scripts/results_rl.py run recall             warm-ups and runs that are missing, two at a time
    python scripts/results_rl.py write recall           docs/results_rl_recall.json and the table

Tasks are `recall` and `visual_search`. Every run is configs/rl/TASK.yaml from its seed's warm-up, on one thread, with
the same prompts and as many optimiser steps. One that stopped goes on where it was.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_pretrain import interval

from hybridmem.training.logs import read_log

ROOT = Path("runs/results_rl")
SEEDS = (0, 1, 2)
METRICS = ("val/pass@1", "val/accuracy")
TOKENS = {"class_path": "hybridmem.policy.DrGRPO"}


def attention(**settings: Any) -> dict[str, Any]:
    """An objective on attention."""
    return {"class_path": "hybridmem.policy.AttentionRL", "init_args": settings}


@dataclass
class Cell:
    """Objectives of a run, and its seeds."""

    objectives: list[dict[str, Any]]
    seeds: tuple[int, ...] = SEEDS


EXPLORED = dict(exploration=1.0, positions="predicting")
CELLS = {
    "token": Cell([TOKENS]),
    "token + attention": Cell([TOKENS, attention()]),
    "attention": Cell([attention()]),
    "attention, explored": Cell([attention(**EXPLORED)]),
    "token + attention, explored": Cell([TOKENS, attention(**EXPLORED)]),
    "token + attention, λ = 0.5": Cell([TOKENS, attention(weight=0.5)], seeds=(0,)),
    "token + attention, λ = 5": Cell([TOKENS, attention(weight=5.0)], seeds=(0,)),
    "token + allocation": Cell([TOKENS, attention(target="allocation")], seeds=(0,)),
    "token + memory": Cell([TOKENS, attention(target="memory")], seeds=(0,)),
    "token + unified": Cell([TOKENS, attention(target="unified")], seeds=(0,)),
}


def cells_of(task: str) -> list[str]:
    """A task's cells: the ablations are of recall."""
    return [name for name, cell in CELLS.items() if task == "recall" or cell.seeds == SEEDS]


# A rollout from which nothing is learnt, then a validation: the start as the runs' own validation sees it.
UNCHANGED = {
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 1,
    "model.init_args.optimizer.init_args.lr": 0.0,
    "model.init_args.lr_scheduler.init_args.warmup_steps": 1,
}


def fit(config: str, folder: Path, seed: int, **options: Any) -> None:
    """One `hybridmem fit` on one thread, its output in a file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "seed_everything": seed,
        "trainer.default_root_dir": folder,
        "trainer.enable_progress_bar": False,
        "data.init_args.seed": seed,
        **options,
    }
    command = [str(Path(sys.executable).parent / "hybridmem"), "fit", "--config", config]
    for key, value in options.items():
        command += [f"--{key}", json.dumps(value) if isinstance(value, list | bool) else str(value)]
    checkpoints = [path for path in (folder / "last.ckpt", folder / "interrupted.ckpt") if path.exists()]
    if checkpoints:
        command += ["--ckpt_path", str(max(checkpoints, key=lambda path: path.stat().st_mtime))]
    with (folder / "output.txt").open("a") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    if code == 0:
        (folder / "finished").touch()
    print(f"{folder}: {'done' if code == 0 else f'FAILED (see {folder}/output.txt)'}", flush=True)


def warm_up(task: str, seed: int) -> Path:
    """The folder of a seed's supervised start."""
    return ROOT / task / "warm_up" / f"seed{seed}"


def run_folder(task: str, name: str, seed: int) -> Path:
    """Where a run lives."""
    return ROOT / task / name.replace(" ", "_").replace(",", "") / f"seed{seed}"


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a run that was finished."""
    return (folder / "finished").exists()


def run_once(config: str, folder: Path, seed: int, **options: Any) -> None:
    """Run what was not finished before."""
    if not is_finished(folder):
        fit(config, folder, seed, **options)


def run_all(task: str, parallel: int) -> None:
    """Warm up every seed, then train every cell, first seeds first and what has one seed last."""

    def start(seed: int) -> None:
        run_once(f"configs/rl/{task}_warmup.yaml", warm_up(task, seed), seed)
        train(("start", seed), [TOKENS], **UNCHANGED)

    def train(run: tuple[str, int], objectives: list | None = None, **changes: Any) -> None:
        name, seed = run
        options = {
            "model.init_args.model": warm_up(task, seed) / "last.ckpt",
            "model.init_args.objectives": objectives or CELLS[name].objectives,
            "model.init_args.seed": seed,
            **changes,
        }
        run_once(f"configs/rl/{task}.yaml", run_folder(task, name, seed), seed, **options)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(start, SEEDS))
        waiting = [(name, seed) for seed in SEEDS for name in cells_of(task) if seed in CELLS[name].seeds]
        waiting.sort(key=lambda run: CELLS[run[0]].seeds != SEEDS)  # ablations last
        list(pool.map(train, waiting))


def curve(folder: Path, metric: str) -> list[float]:
    """A metric at every validation of a run."""
    log = read_log(folder)
    return [log[metric][step] for step in sorted(log[metric])]


def write(task: str) -> None:
    """Write the JSON, and the table between its markers in docs/results.md."""
    results: dict[str, Any] = {}
    lines = [
        "| objectives | seeds | pass@1 | gain | greedy accuracy | gain |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    starts = {seed: {m: curve(run_folder(task, "start", seed), m)[-1] for m in METRICS} for seed in SEEDS}
    planned = {"start": SEEDS, **{name: CELLS[name].seeds for name in cells_of(task)}}
    for name in planned:
        seeds = [seed for seed in planned[name] if is_finished(run_folder(task, name, seed))]
        if not seeds:
            continue
        curves = {metric: [curve(run_folder(task, name, seed), metric) for seed in seeds] for metric in METRICS}
        results[name] = {"seeds": seeds, **curves}
        cells = [name, str(len(seeds))]
        for metric, values in curves.items():
            after = [100 * value[-1] for value in values]
            gain = [end - 100 * starts[seed][metric] for end, seed in zip(after, seeds, strict=True)]
            cells += [interval(after, digits=1), "" if name == "start" else interval(gain, digits=1)]
        lines.append("| " + " | ".join(cells) + " |")
    Path(f"docs/results_rl_{task}.json").write_text(json.dumps(results, indent=1) + "\n")
    page = Path("docs/results.md")
    text = page.read_text()
    start, end = f"<!-- {task}: written by scripts/results_rl.py -->", f"<!-- end of {task} -->"
    page.write_text(text.split(start)[0] + start + "\n" + "\n".join(lines) + "\n" + end + text.split(end)[1])
    print("\n".join(lines))


def main() -> None:
    """Run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "write"])
    parser.add_argument("task", choices=["recall", "visual_search"])
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    arguments = parser.parse_args()
    if arguments.part == "run":
        run_all(arguments.task, arguments.parallel)
    else:
        write(arguments.task)


if __name__ == "__main__":
    main()
