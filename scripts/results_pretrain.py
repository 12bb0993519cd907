"""Trains the small models of docs/results/pretraining.md, and writes their table.

    python scripts/results_pretrain.py time             measure seconds per step of every model, in turn
    python scripts/results_pretrain.py run              train the missing models, two at a time
    python scripts/results_pretrain.py write            write docs/data/pretrain.json and the tables

Runs use configs/quickstart.yaml with 300 or 600 steps, on one thread each. Interrupted runs are resumed, and finished
ones are skipped.
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
from typing import Any

import yaml
from compare_runs import AT_POSITION, last, loss_by_position
from tables import mean_and_half, write_tables

from hybridmem.training.checkpoints.durable import to_go_on_from
from hybridmem.training.logs import read_log

ROOT = Path("runs/results")
STEPS, LONGER = 300, 600
SEEDS = (0, 1, 2)
CONV = {"attention_conv": True}


@dataclass
class Cell:
    """Row of the table: changes to the configuration, steps, seeds and an optional time limit."""

    config: dict[str, Any]
    steps: int = STEPS
    seeds: tuple[int, ...] = SEEDS
    as_long_as: str | None = None  # cell whose training time sets the number of steps


MAG = {"variant": "mag"} | CONV
MIXED = {"layer_types": ["swa", "mag", "swa"], "memory_heads": 4} | CONV
SHAPE = yaml.safe_load(Path("configs/quickstart.yaml").read_text())["model"]["init_args"]["config"]
SHAPE |= {"layer_types": None, "attention_conv": False, "memory_heads": 2}
CELLS = {
    "swa": Cell({"variant": "swa"}),
    "swa + conv": Cell({"variant": "swa"} | CONV),
    "full": Cell({"variant": "full"}),
    "full + conv": Cell({"variant": "full"} | CONV),
    "mal": Cell({"variant": "mal"} | CONV),
    "mac": Cell({"variant": "mac"} | CONV),
    "mag": Cell(MAG),
    "swa + conv, as large as mag": Cell({"variant": "swa", "intermediate_size": 496} | CONV),
    "swa + conv, as long as mag": Cell({"variant": "swa"} | CONV, as_long_as="mag"),
    "mixed": Cell(MIXED, LONGER),
    "swa + conv, longer": Cell({"variant": "swa"} | CONV, LONGER),
    "swa + conv, as long as mixed": Cell({"variant": "swa"} | CONV, LONGER, as_long_as="mixed"),
    "mag without momentum": Cell(MAG | {"memory_momentum": False}, seeds=(0,)),
    "mag without forgetting": Cell(MAG | {"memory_forgetting": False}, seeds=(0,)),
    "mag without convolutions": Cell(MAG | {"memory_conv_size": 1, "attention_conv": False}, seeds=(0,)),
    "mag without attention's convolution": Cell(MAG | {"attention_conv": False}, seeds=(0,)),
    "mag without persistent tokens": Cell(MAG | {"num_persistent_tokens": 0}, seeds=(0,)),
    "mag with a memory of depth 2": Cell(MAG | {"memory_depth": 2}, seeds=(0,)),
}


def folder(name: str, seed: int) -> Path:
    """Return the folder of a run."""
    return ROOT / name.replace(" ", "_").replace("'", "").replace(",", "") / f"seed{seed}"


def steps_of(name: str) -> int:
    """Return the optimiser steps of a cell."""
    cell = CELLS[name]
    if cell.as_long_as is None:
        return cell.steps
    seconds = json.loads((ROOT / "seconds_per_step.json").read_text())
    return round(cell.steps * seconds[cell.as_long_as] / seconds["swa + conv"])


def command(name: str, seed: int) -> list[str]:
    """Return the `hybridmem fit` command of a run."""
    run, steps = folder(name, seed), steps_of(name)
    options: dict[str, Any] = {
        "seed_everything": seed,
        "trainer.default_root_dir": run,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.enable_progress_bar": False,
        "model.init_args.position_edges": [0, 64, 256, 1024],
        "data.init_args.seed": seed,
        "data.init_args.val_sequence_length": 4096,
        "data.init_args.val_batch_size": 2,
        "data.init_args.max_val_bytes": 600_000,
    }
    config = {"attention_conv": False, "memory_heads": 2} | CELLS[name].config
    config.setdefault("layer_types", [config.pop("variant", "mag")] * SHAPE["num_hidden_layers"])
    options |= {f"model.init_args.config.{key}": value for key, value in config.items()}
    fit = [str(Path(sys.executable).parent / "hybridmem"), "fit", "--config", "configs/quickstart.yaml"]
    for key, value in options.items():
        fit += [f"--{key}", json.dumps(value) if isinstance(value, list | bool | None) else str(value)]
    checkpoint = to_go_on_from(run)
    return fit if checkpoint is None else [*fit, "--ckpt_path", str(checkpoint)]


def steps_run(name: str, seed: int) -> int:
    """Return the optimiser steps before a run's final validation, or 0 without one."""
    try:
        return max(read_log(folder(name, seed))["val/bits_per_byte"]) + 1
    except (SystemExit, KeyError):
        return 0


def finished(name: str, seed: int) -> bool:
    """Return True if a run's final loss is on disk, with 1 % tolerance for step counts from new timings."""
    return steps_run(name, seed) >= 0.99 * steps_of(name)


def train(name: str, seed: int) -> None:
    """Train one cell on one thread, with its output in the run's folder."""
    run = folder(name, seed)
    run.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (run / "output.txt").open("a") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(
            command(name, seed), stdout=output, stderr=output, env=environment, check=False
        ).returncode
    state = "done" if code == 0 else f"FAILED (see {run}/output.txt)"
    print(f"{name}, seed {seed}: {state} after {time.perf_counter() - started:.0f} s", flush=True)


def run_all(parallel: int) -> None:
    """Train the missing runs, seed by seed, so that every cell has a result early."""
    seeds = sorted({seed for cell in CELLS.values() for seed in cell.seeds})
    waiting = [(name, seed) for seed in seeds for name, cell in CELLS.items() if seed in cell.seeds]
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(lambda run: train(*run), [run for run in waiting if not finished(*run)]))


def time_steps(rounds: int = 6) -> None:
    """Measure seconds per training step of every architecture on one thread, in turn: the fastest of all rounds."""
    import torch

    from hybridmem import HybridMemConfig, HybridMemForCausalLM
    from hybridmem.training.allocator import keep_freed_memory
    from hybridmem.training.denormals import flush_denormals

    keep_freed_memory()
    flush_denormals()
    torch.set_num_threads(1)
    models = {
        name: HybridMemForCausalLM(HybridMemConfig(**(SHAPE | cell.config)))
        for name, cell in CELLS.items()
        if cell.as_long_as is None and name != "swa + conv, longer"
    }
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()}
    ids = torch.randint(0, 256, (8, 1024))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number:
                seconds[name].append(time.perf_counter() - started)
    least = {name: round(min(values), 4) for name, values in seconds.items()}
    ROOT.mkdir(parents=True, exist_ok=True)
    (ROOT / "seconds_per_step.json").write_text(json.dumps(least, indent=1))
    for name, value in least.items():
        print(f"{name:40} {value:.3f} s  {value / least['swa + conv']:.2f} x swa + conv")


def collect() -> dict[str, Any]:
    """Return the results of all finished runs."""
    seconds = json.loads((ROOT / "seconds_per_step.json").read_text())
    results = {}
    for name, cell in CELLS.items():
        logs = {seed: read_log(folder(name, seed)) for seed in cell.seeds if finished(name, seed)}
        if not logs:
            continue
        ranges = loss_by_position(next(iter(logs.values())))
        keys = ["val/bits_per_byte", *(AT_POSITION + name for name in ranges)]
        results[name] = {
            "steps": steps_run(name, next(iter(logs))),
            "parameters": parameters(cell.config),
            "seconds_per_step": seconds.get(name, seconds["swa + conv"]),
            "seeds": list(logs),
            **{key.removeprefix("val/"): [last(log[key]) for log in logs.values()] for key in keys},
        }
    return results


def parameters(config: dict[str, Any]) -> int:
    """Return the number of parameters of a cell's model."""
    from hybridmem import HybridMemConfig, HybridMemForCausalLM

    return HybridMemForCausalLM(HybridMemConfig(**(SHAPE | config))).num_parameters()


def write() -> None:
    """Write the JSON file, and the table in docs/results/pretraining.md."""
    results = collect()
    Path("docs/data/pretrain.json").write_text(json.dumps(results, indent=1) + "\n")
    totals = [["model", "parameters", "steps", "s/step", "bits per byte"]]
    positions = [["model", "first 64", "64-255", "256-1023", "1024-4095"]]
    for name, row in results.items():
        ranges = [mean_and_half(values) for key, values in row.items() if key.startswith("bits_per_byte_at/")]
        size, seconds = f"{row['parameters'] / 1e3:.0f}k", f"{row['seconds_per_step']:.2f}"
        totals.append([name, size, str(row["steps"]), seconds, mean_and_half(row["bits_per_byte"])])
        positions.append([name, *ranges])
    write_tables("pretraining", [totals, positions])


def main() -> None:
    """Time, train or write, as requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["time", "run", "write"])
    parser.add_argument("--parallel", type=int, default=2, help="number of parallel runs, with one thread each")
    arguments = parser.parse_args()
    if arguments.part == "time":
        time_steps()
    elif arguments.part == "run":
        run_all(arguments.parallel)
    else:
        write()


if __name__ == "__main__":
    main()
