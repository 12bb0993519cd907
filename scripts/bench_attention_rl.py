"""Peak memory and time of the divergence of two attention policies, tile by tile and with full maps.

    python scripts/bench_attention_rl.py [--output docs/data/attention_rl.json]

The input is one row with 4 heads of 32, and all queries count. Each result comes from its own process. Memory is the
peak resident set of the first forward and backward pass minus the resident set before; time is the best of several
more. Full maps grow quadratically with the length, and are skipped once they would exceed --limit.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import torch
from bench_measure import peak_megabytes, resident_megabytes

from hybridmem_kernels import attention_divergence

HEADS, DIM = 4, 32
NAMES = {"torch": "tile by tile", "reference": "full maps"}


def compare(backend: str, length: int, window: int | None) -> None:
    """Run one forward and backward pass on inputs in the layout of an attention layer."""
    q, k, q_ref, k_ref = (torch.randn(1, HEADS, length, DIM) for _ in range(4))
    q.requires_grad_()
    k.requires_grad_()
    stats = attention_divergence(q, k, q_ref, k_ref, window=window, window_ref=window, backend=backend)
    (stats.jsd.mean() - 0.01 * stats.entropy.mean()).backward()


def measure(backend: str, length: int, window: int | None, repeats: int, threads: int) -> dict[str, float]:
    """Measure peak memory in MB and seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    compare(backend, 64, window)  # excludes the libraries' one-time setup
    start = resident_megabytes()
    compare(backend, length, window)
    peak = peak_megabytes() - start
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        compare(backend, length, window)
        seconds.append(time.perf_counter() - began)
    return {"peak_mb": round(peak, 1), "seconds": round(min(seconds), 4)}


def main() -> None:
    """Measure every length and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--window", type=int, help="attention window of both policies (default: none)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=8, help="maximum GB for full maps")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    print(f"{'':14}{'tokens':>8}{'peak MB':>10}{'seconds':>10}")
    rows = []
    for backend, name in NAMES.items():
        last = None
        for length in sorted(arguments.lengths):
            if (
                backend == "reference"
                and last
                and last["peak_mb"] * (length / last["tokens"]) ** 2 > arguments.limit * 1024
            ):
                print(f"{name:14}{length:>8,}   skipped: more than {arguments.limit:g} GB")
                break
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                figures = pool.apply(measure, (backend, length, arguments.window, arguments.repeats, arguments.threads))
            last = {"tokens": length, **figures}
            rows.append({"form": name, **last})
            print(f"{name:14}{length:>8,}{last['peak_mb']:>10.1f}{last['seconds']:>10.3f}", flush=True)
    if arguments.output:
        settings = dict(heads=HEADS, dim=DIM, window=arguments.window, threads=arguments.threads)
        arguments.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
