"""Runs the pipeline of configs/rl/workspace*.yaml over three seeds, and writes its table in docs/results/workspace.md.

    python scripts/results_workspace.py run             run unfinished stages, two seeds at a time, one thread each
    python scripts/results_workspace.py write           write docs/data/workspace.json and the table

Each stage starts from the previous one. An interrupted stage resumes from its newest checkpoint.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tables import mean_and_half, write_tables

from hybridmem.compare.answer import percent
from hybridmem.compare.results import interval
from hybridmem.training.checkpoints.durable import to_go_on_from
from hybridmem.training.logs import read_log

ROOT = Path("runs/workspace")
SEEDS = (0, 1, 2)
FIGURES = {"solved, likeliest": "val/accuracy", "solved, sampled": "val/pass@1", "turns": "val/turns"}


@dataclass
class Stage:
    """Stage of the pipeline: name, configuration, previous stage and command."""

    name: str
    config: str
    after: str | None = None
    command: str = "fit"


STAGES = [
    Stage("warm-up", "workspace_warmup"),
    Stage("base", "workspace_rft", after="warm-up", command="validate"),
    Stage("rejection fine-tuning", "workspace_rft", after="warm-up"),
    Stage("stage 1", "workspace", after="rejection fine-tuning"),
    Stage("stage 1 in larger folders", "workspace_stage2", after="stage 1", command="validate"),
    Stage("stage 2", "workspace_stage2", after="stage 1"),
]


def folder(name: str, seed: int) -> Path:
    """Return the folder of a stage."""
    return ROOT / name.replace(" ", "_") / f"seed{seed}"


def run_stage(stage: Stage, seed: int) -> None:
    """Run a stage unless it is finished, with its output in the stage's folder.

    Raises:
        RuntimeError: the stage failed.
    """
    run = folder(stage.name, seed)
    if (run / "finished").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    options = {
        "config": f"configs/rl/{stage.config}.yaml",
        "seed_everything": seed,
        "data.init_args.seed": seed,
        "trainer.default_root_dir": run,
        "trainer.enable_progress_bar": "false",
    }
    if stage.after is not None:
        options |= {"model.init_args.model": folder(stage.after, seed) / "last.ckpt", "model.init_args.seed": seed}
    checkpoint = to_go_on_from(run)
    if checkpoint is not None:
        options["ckpt_path"] = checkpoint
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    started = time.perf_counter()
    with (run / "output.txt").open("a") as output:
        code = subprocess.run(
            [str(Path(sys.executable).parent / "hybridmem"), stage.command, *arguments],
            stdout=output,
            stderr=output,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        ).returncode
    print(f"{stage.name}, seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    if code:
        raise RuntimeError(f"{stage.name}, seed {seed} failed; see {run}/output.txt")
    (run / "finished").touch()


def run_pipeline(seed: int) -> None:
    """Run all stages of a seed in order."""
    for stage in STAGES:
        run_stage(stage, seed)


def write() -> None:
    """Write the JSON file, and the table in docs/results/workspace.md."""
    results = {}
    table = [["stage", "folders of", "seeds", *FIGURES]]
    for stage in STAGES[1:]:
        finished = [seed for seed in SEEDS if (folder(stage.name, seed) / "finished").exists()]
        if not finished:
            continue
        logs = [read_log(folder(stage.name, seed)) for seed in finished]
        figures = {title: interval([log[key][max(log[key])] for log in logs]) for title, key in FIGURES.items()}
        results[stage.name] = {"seeds": finished, **figures}
        files = "8 files" if stage.config.endswith("stage2") else "4 files"
        shares = [percent(figures[title]) for title in ("solved, likeliest", "solved, sampled")]
        turns = mean_and_half(figures["turns"]["values"], digits=2)
        table.append([stage.name, files, str(len(finished)), *shares, turns])
    Path("docs/data/workspace.json").write_text(json.dumps(results, indent=1) + "\n")
    write_tables("workspace", [table])


def main() -> None:
    """Run the pipeline or write its results, as requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "write"])
    parser.add_argument("--parallel", type=int, default=2, help="number of parallel seeds, with one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS, help="seeds to run")
    arguments = parser.parse_args()
    if arguments.part == "write":
        write()
    else:
        with ThreadPoolExecutor(arguments.parallel) as pool:
            pipelines = [pool.submit(run_pipeline, seed) for seed in arguments.seeds]
        for pipeline in pipelines:
            pipeline.result()  # raises a seed's error after the other seeds have finished


if __name__ == "__main__":
    main()
