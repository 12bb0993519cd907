"""Trains the small models of docs/results/pretraining.md, and writes their table.

    python scripts/results_pretrain.py time             measure seconds per step of every model, in turn
    python scripts/results_pretrain.py run              train the missing models, two at a time
    python scripts/results_pretrain.py write            write docs/data/pretrain.json and the tables

Runs use configs/quickstart.yaml, or a baseline's configuration, on one thread each. Interrupted runs are resumed, and
finished ones are skipped. `--cells` names some of the models; `write` keeps the committed rows of all others.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import yaml
from compare_runs import AT_POSITION, last, loss_by_position
from tables import Table, mean_and_half, write_tables

from hybridmem import HybridMemConfig
from hybridmem.training import PretrainModule
from hybridmem.training.allocator import keep_freed_memory
from hybridmem.training.checkpoints.durable import to_go_on_from
from hybridmem.training.denormals import flush_denormals
from hybridmem.training.logs import read_log

ROOT = Path("runs/results")
DATA = Path("docs/data/pretrain.json")
QUICKSTART = "configs/quickstart.yaml"
STEPS, LONGER, SHORT = 300, 600, 160
SEEDS = (0, 1, 2)
CONV = {"attention_conv": True}
BATCH_SIZE = "data.init_args.batch_size"


@dataclass
class Cell:
    """Row of a table: changes to the configuration, steps, seeds and an optional time limit."""

    config: dict[str, Any]
    steps: int = STEPS
    seeds: tuple[int, ...] = SEEDS
    as_long_as: str | None = None  # cell whose training time sets the number of steps
    timed_as: str | None = None  # cell of the same model, which `time` measures; None: this one
    file: str = QUICKSTART
    options: dict[str, Any] = field(default_factory=dict)  # further settings of `hybridmem fit`

    @property
    def is_peer(self) -> bool:
        """True for a baseline, a model of transformers."""
        return self.file != QUICKSTART


MAG = {"variant": "mag"} | CONV
MIXED = {"layer_types": ["swa", "mag", "swa"], "memory_heads": 4} | CONV
SHAPE = yaml.safe_load(Path(QUICKSTART).read_text())["model"]["init_args"]["config"]
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
    "swa + conv, as long as mag": Cell({"variant": "swa"} | CONV, as_long_as="mag", timed_as="swa + conv"),
    "mixed": Cell(MIXED, LONGER),
    "swa + conv, longer": Cell({"variant": "swa"} | CONV, LONGER, timed_as="swa + conv"),
    "swa + conv, as long as mixed": Cell({"variant": "swa"} | CONV, LONGER, as_long_as="mixed", timed_as="swa + conv"),
    "mag without momentum": Cell(MAG | {"memory_momentum": False}, seeds=(0,)),
    "mag without forgetting": Cell(MAG | {"memory_forgetting": False}, seeds=(0,)),
    "mag without convolutions": Cell(MAG | {"memory_conv_size": 1, "attention_conv": False}, seeds=(0,)),
    "mag without attention's convolution": Cell(MAG | {"attention_conv": False}, seeds=(0,)),
    "mag without persistent tokens": Cell(MAG | {"num_persistent_tokens": 0}, seeds=(0,)),
    "mag with a memory of depth 2": Cell(MAG | {"memory_depth": 2}, seeds=(0,)),
}


PEERS = {"mamba-2": "configs/pretrain/mamba2.yaml", "gated deltanet": "configs/pretrain/gated_deltanet.yaml"}
for peer, file in PEERS.items():
    CELLS[peer] = Cell({}, LONGER, file=file)
    CELLS[f"{peer}, as long as mixed"] = Cell({}, LONGER, as_long_as="mixed", timed_as=peer, file=file)
SMALL = {
    BATCH_SIZE: 2,
    "data.init_args.max_val_bytes": 100_000,
    "model.init_args.lr_scheduler.init_args.warmup_steps": 20,
}
SHORT_CELLS = {
    "mixed, short": Cell(MIXED, SHORT, (0,), options=SMALL),
    **{f"{peer}, short": Cell({}, SHORT, (0,), file=file, options=SMALL) for peer, file in PEERS.items()},
    "mixed, short, as long as mamba-2": Cell(MIXED, SHORT, (0,), "mamba-2, short", "mixed, short", options=SMALL),
}
CELLS |= SHORT_CELLS


def folder(name: str, seed: int) -> Path:
    """Return the folder of a run."""
    return ROOT / name.replace(" ", "_").replace("'", "").replace(",", "") / f"seed{seed}"


def seconds_per_step() -> dict[str, float]:
    """Return the measured seconds per step of every model, from this machine or else from the committed file."""
    committed = {name: row["seconds_per_step"] for name, row in json.loads(DATA.read_text()).items()}
    measured = ROOT / "seconds_per_step.json"
    return committed | (json.loads(measured.read_text()) if measured.exists() else {})


def timed_as(name: str) -> str:
    """Return the cell with the same model that `time` measures."""
    return CELLS[name].timed_as or name


def steps_of(name: str) -> int:
    """Return the optimiser steps of a cell."""
    cell = CELLS[name]
    if cell.as_long_as is None:
        return cell.steps
    seconds, pair = seconds_per_step(), (timed_as(cell.as_long_as), timed_as(name))
    for timed in pair:
        if timed not in seconds:
            raise SystemExit(f"the seconds per step of {timed!r} are unknown; run {sys.argv[0]} time first")
    return round(cell.steps * seconds[pair[0]] / seconds[pair[1]])


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
    cell = CELLS[name]
    if not cell.is_peer:
        config = {"attention_conv": False, "memory_heads": 2} | cell.config
        config.setdefault("layer_types", [config.pop("variant", "mag")] * SHAPE["num_hidden_layers"])
        options |= {f"model.init_args.config.{key}": value for key, value in config.items()}
    options |= cell.options
    fit = [str(Path(sys.executable).parent / "hybridmem"), "fit", "--config", cell.file]
    for key, value in options.items():
        fit += [f"--{key}", json.dumps(value) if isinstance(value, list | bool | None) else str(value)]
    checkpoint = to_go_on_from(run)
    return fit if checkpoint is None else [*fit, "--ckpt_path", str(checkpoint)]


def steps_run(name: str, seed: int) -> int:
    """Return the optimiser steps before a run's final validation, or 0 without one."""
    try:
        return max(read_log(folder(name, seed))["val/bits_per_byte"]) + 1
    except (FileNotFoundError, KeyError):
        return 0


def finished(name: str, seed: int) -> bool:
    """Return True if a run's final loss is on disk, with 1 % tolerance for step counts from new timings."""
    steps = steps_run(name, seed)
    return steps > 0 and steps >= 0.99 * steps_of(name)


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


def run_all(names: list[str], parallel: int) -> None:
    """Train the missing runs, seed by seed, so that every cell has a result early."""
    seeds = sorted({seed for name in names for seed in CELLS[name].seeds})
    waiting = [(name, seed) for seed in seeds for name in names if seed in CELLS[name].seeds]
    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(lambda run: train(*run), [run for run in waiting if not finished(*run)]))


def build(name: str) -> Any:
    """Build a cell's model."""
    cell = CELLS[name]
    config: Any = HybridMemConfig(**(SHAPE | cell.config))
    if cell.is_peer:
        given = yaml.safe_load(Path(cell.file).read_text())["model"]["init_args"]["config"]
        config = resolve_name(given["class_path"])(**given["init_args"])
    module = PretrainModule(config)
    module.configure_model()
    return module.model


def time_steps(names: list[str], rounds: int = 6) -> None:
    """Measure processor seconds per step of every named model on one thread, in turn: the fastest of all rounds."""
    keep_freed_memory()
    flush_denormals()
    torch.set_num_threads(1)
    models = {name: build(name) for name in dict.fromkeys(map(timed_as, names))}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()}
    batches = {name: torch.randint(0, 256, (CELLS[name].options.get(BATCH_SIZE, 8), 1024)) for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            started = time.process_time()
            ids = batches[name]
            model(ids, labels=ids, use_cache=False).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number:
                seconds[name].append(time.process_time() - started)
    least = {name: round(min(values), 4) for name, values in seconds.items()}
    ROOT.mkdir(parents=True, exist_ok=True)
    (ROOT / "seconds_per_step.json").write_text(json.dumps(seconds_per_step() | least, indent=1))
    for name, value in least.items():
        print(f"{name:40} {value:.3f} s  {value / next(iter(least.values())):.2f} x {next(iter(least))}")


def collect() -> dict[str, Any]:
    """Return the results of all finished runs, and the committed results of cells that have no runs here."""
    seconds, committed = seconds_per_step(), json.loads(DATA.read_text())
    results: dict[str, Any] = {}
    for name, cell in CELLS.items():
        logs = {seed: read_log(folder(name, seed)) for seed in cell.seeds if finished(name, seed)}
        if not logs:
            results |= {name: committed[name]} if name in committed else {}
            continue
        ranges = loss_by_position(next(iter(logs.values())))
        keys = ["val/bits_per_byte", *(AT_POSITION + name for name in ranges)]
        results[name] = {
            "steps": steps_run(name, next(iter(logs))),
            "parameters": build(name).num_parameters(),
            "seconds_per_step": seconds[timed_as(name)],
            "seeds": list(logs),
            **{key.removeprefix("val/"): [last(log[key]) for log in logs.values()] for key in keys},
        }
    return results


def write() -> None:
    """Write the JSON file, and the tables in docs/results/pretraining.md."""
    results = collect()
    DATA.write_text(json.dumps(results, indent=1) + "\n")
    write_tables("pretraining", tables({name: row for name, row in results.items() if name not in SHORT_CELLS}))
    write_tables("peers", tables({name: row for name, row in results.items() if name in SHORT_CELLS}))


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables of the total loss and of the loss by position."""
    totals = [["model", "parameters", "steps", "s/step", "bits per byte"]]
    positions = [["model", "first 64", "64-255", "256-1023", "1024-4095"]]
    for name, row in results.items():
        ranges = [mean_and_half(values) for key, values in row.items() if key.startswith("bits_per_byte_at/")]
        size, seconds = f"{row['parameters'] / 1e3:.0f}k", f"{row['seconds_per_step']:.2f}"
        totals.append([name, size, str(row["steps"]), seconds, mean_and_half(row["bits_per_byte"])])
        positions.append([name, *ranges])
    return [totals, positions]


def main() -> None:
    """Time, train or write, as requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["time", "run", "write"])
    parser.add_argument("--parallel", type=int, default=2, help="number of parallel runs, with one thread each")
    parser.add_argument("--cells", nargs="+", choices=CELLS, metavar="CELL", help="some rows of the tables")
    arguments = parser.parse_args()
    names = arguments.cells or list(CELLS)
    if arguments.part == "time":
        time_steps(names)
    elif arguments.part == "run":
        run_all(names, arguments.parallel)
    else:
        write()


if __name__ == "__main__":
    main()
