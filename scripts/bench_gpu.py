"""Training speed of models of configs/pretrain/170m.yaml on one GPU, with the memory's Triton and PyTorch operators.

    python scripts/bench_gpu.py [--output docs/data/gpu.json]

Each result is for the forward and backward pass of 4 rows of 4,096 tokens in bfloat16 autocast, without activation
checkpointing and without an optimiser. Times are medians of eight calls on the device after two warm-up calls, and
memory is the peak on the device. The output is written after each row, so an interrupted run keeps its results.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem_kernels import use_backend
from hybridmem_kernels.tools.gpu_check import machine

CONFIG = yaml.safe_load(Path("configs/pretrain/170m.yaml").read_text())["model"]["init_args"]["config"]
BATCH, LENGTH = 4, 4096
CASES: list[tuple[dict[str, Any], str, bool]] = [  # changes of the configuration, backend, torch.compile
    (dict(variant="full"), "triton", False),
    (dict(variant="swa"), "triton", False),
    (dict(variant="swa"), "triton", True),
    (dict(variant="mag"), "triton", False),
    (dict(variant="mag"), "triton", True),
    (dict(variant="mag"), "torch", False),
    (dict(variant="mag", memory_depth=2), "triton", False),
    (dict(variant="mac"), "triton", False),
    (dict(variant="lmm"), "triton", False),
    (dict(variant="mag", memory_depth=2), "torch", False),
]


def timed(run: Callable[[], Any], calls: int = 8) -> tuple[float, float]:
    """Return the seconds of a call and the peak GB on the device."""
    for _ in range(2):
        run()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30


def training(changes: dict[str, Any], backend: str, compiled: bool) -> dict[str, Any]:
    """Measure tokens per second and memory of a step."""
    torch.manual_seed(0)
    model: Any = HybridMemForCausalLM(HybridMemConfig(**(CONFIG | changes))).cuda()
    forward = torch.compile(model) if compiled else model
    ids = torch.randint(0, CONFIG["vocab_size"], (BATCH, LENGTH), device="cuda")

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(ids, labels=ids, use_cache=False).loss
        loss.backward()

    with use_backend(backend):
        seconds, gigabytes = timed(step)
    return changes | dict(
        backend=backend,
        compiled=compiled,
        parameters=model.num_parameters(),
        tokens_per_second=round(BATCH * LENGTH / seconds),
        gb=round(gigabytes, 2),
    )


def main() -> None:
    """Measure all cases, and print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(training(*case))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
        if arguments.output:
            arguments.output.write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
