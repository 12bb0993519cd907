"""Ahead-of-time builds of every Triton kernel, without a GPU, and a report of their resources.

    python -m hybridmem_kernels.tools.aot                       # build, print the table, compare it with resources.json
    python -m hybridmem_kernels.tools.aot --write               # accept the table
    python -m hybridmem_kernels.tools.aot --targets sm90 --dtypes bf16 --match memory_scan

The shapes come from the model configurations in configs/pretrain. A kernel fails if it spills registers, exceeds the
target's shared memory, multiplies matrices without tensor cores, or uses more resources than in the committed table.
Triton caches built kernels, so that a kernel is built only once.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

# Kernels cannot be built under the interpreter, and its default differs between releases of Triton.
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import yaml
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..attention_divergence import triton_autograd as attention_divergence
from ..builds import DTYPES, Build
from ..memory_mlp_scan import triton_autograd as memory_mlp_scan
from ..memory_scan import triton_autograd as memory_scan
from .resources import Resources, Row, Table, problems, read_tables, write_tables

CONFIGS = Path(__file__).parents[3] / "configs" / "pretrain"
NAMED_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Target(NamedTuple):
    """GPU architecture to build for."""

    gpu: GPUTarget
    tensor_core: str  # a pattern of its matrix product instructions


TARGETS = {
    "sm80": Target(GPUTarget("cuda", 80, 32), r"\bmma\.sync"),
    "sm90": Target(GPUTarget("cuda", 90, 32), r"\b(?:wgmma\.mma_async|mma\.sync)"),
    "sm100": Target(GPUTarget("cuda", 100, 32), r"\b(?:tcgen05\.mma|mma\.sync)"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), r"\bv_mfma"),
}


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model configuration for which kernels are compiled."""

    head_dim: int
    memory_head_dim: int
    memory_chunk_size: int
    memory_widths: tuple[int, ...]  # of a deep memory

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shapes":
        """Read the `config` block of a configuration, with HybridMemConfig's defaults for missing settings."""
        dim, depth = config.get("memory_head_dim", 64), max(2, config.get("memory_depth", 1))
        hidden = dim * config.get("memory_expansion", 1)
        widths = (dim, *[hidden] * (depth - 1), dim)
        return cls(config.get("head_dim", 64), dim, config.get("memory_chunk_size", 64), widths)

    def builds(self, dtype: torch.dtype, hip: bool) -> list[Build]:
        """List the builds of all kernels of all operators."""
        dim, chunk = self.memory_head_dim, self.memory_chunk_size
        backend = "hip" if hip else "cuda"
        operators = {
            "memory_scan": memory_scan.builds(1, 1, 2 * chunk, dim, dim, dtype, chunk, hip),
            "memory_mlp_scan": memory_mlp_scan.builds(self.memory_widths, chunk, dtype, backend),
            "attention_divergence": attention_divergence.builds(self.head_dim, self.head_dim, dtype, hip=hip),
        }
        return [
            replace(build, name=f"{operator}: {build.name.removeprefix(operator).strip()}")
            for operator, builds in operators.items()
            for build in builds
        ]


def shapes_of(paths: Iterable[Path]) -> list[Shapes]:
    """Collect the distinct shapes of training configurations."""
    configs = [yaml.safe_load(path.read_text())["model"]["init_args"]["config"] for path in paths]
    return list(dict.fromkeys(Shapes.of(config) for config in configs))


def list_builds(
    targets: Sequence[str], shapes: Sequence[Shapes], dtypes: Sequence[str], match: str
) -> list[tuple[str, Build]]:
    """List the distinct requested builds as (target, build)."""
    found: dict[tuple[str, str], Build] = {}
    for target in targets:
        hip = TARGETS[target].gpu.backend == "hip"
        for shape in shapes:
            for dtype in dtypes:
                for build in shape.builds(NAMED_DTYPES[dtype], hip):
                    if re.search(match, build.name):
                        found.setdefault((target, build.name), build)
    return [(target, build) for (target, _), build in found.items()]


def measure(target: Target, build: Build) -> Resources:
    """Build a kernel, or take it from Triton's cache, and read its resources."""
    options = dict(num_warps=build.num_warps, num_stages=build.num_stages)
    if build.maxnreg is not None:
        options["maxnreg"] = build.maxnreg
    source = ASTSource(build.kernel, build.signature, build.constexprs, _alignments(build))
    kernel = triton.compile(source, target=target.gpu, options=options)
    read = _read_amdgcn if target.gpu.backend == "hip" else _read_cubin
    registers, spills, assembly = read(kernel.asm)
    return Resources(registers, spills, kernel.metadata.shared, len(re.findall(target.tensor_core, assembly)))


def _alignments(build: Build) -> dict[tuple[int, ...], list[list[Any]]]:
    """Declare tensors and row strides as multiples of 16 bytes, which a launch would detect by itself."""
    aligned = ("_ptr", "_batch", "_head", "_time")
    places: list[tuple[int, ...]] = []
    for n, name in enumerate(build.kernel.arg_names):
        kind = build.signature[name]
        if fields := getattr(kind, "_fields", ()):
            places += [(n, m) for m, field in enumerate(fields) if field.endswith(aligned)]
        elif kind != "constexpr" and name.endswith(aligned):
            places.append((n,))
    return {place: [["tt.divisibility", 16]] for place in places}


def _read_cubin(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Return (registers, bytes spilled, assembly) of an NVIDIA kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], asm["ptx"]


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Return (vector registers, bytes spilled, assembly) of an AMD kernel."""
    assembly = asm["amdgcn"]
    usage = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    # Scratch memory holds the spills of both kinds of registers.
    return usage["vgpr_count"], usage["private_segment_fixed_size"], assembly


_builds: list[tuple[str, Build]] = []  # this worker's list; kernels cannot be pickled


def _start_worker(arguments: tuple[Any, ...]) -> None:
    _builds.extend(list_builds(*arguments))


def _measure_nth(n: int) -> Resources:
    target, build = _builds[n]
    return measure(TARGETS[target], build)


def measure_all(arguments: tuple[Any, ...], jobs: int) -> list[Row]:
    """Measure all of `list_builds(*arguments)`, printing each result."""
    builds, rows = list_builds(*arguments), []
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (arguments,)) as pool:
        for (target, build), resources in zip(builds, pool.map(_measure_nth, range(len(builds))), strict=True):
            rows.append(Row(target, build.name, build.has_dots, resources))
            numbers = "".join(f"{number:>10}" for number in astuple(resources))
            print(f"{target:8}{build.name:74}{build.num_warps:>5}{numbers}", flush=True)
    return rows


def main(command_line: Sequence[str] | None = None) -> int:
    """Build kernels, print and compare their resources; return 1 if there are problems."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridmem_kernels.tools.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--configs", nargs="+", type=Path, default=sorted(CONFIGS.glob("*.yaml")))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(NAMED_DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--match", default="", help="regular expression to select kernels by name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="write the results to resources.json")
    arguments = parser.parse_args(command_line)
    what = (arguments.targets, shapes_of(arguments.configs), arguments.dtypes, arguments.match)
    if not list_builds(*what):
        parser.error("no kernel is selected: check --configs and --match")
    columns = "".join(f"{name:>10}" for name in ("registers", "spills", "shared", "mma"))
    print(f"Triton {triton.__version__}\n{'target':8}{'kernel':74}{'warps':>5}{columns}", flush=True)
    rows, tables = measure_all(what, arguments.jobs), read_tables()
    if arguments.write:
        tables[triton.__version__] = _updated(tables.get(triton.__version__, {}), rows)
        write_tables(tables)
    wrong = problems(rows, tables.get(triton.__version__))
    print("\n".join(wrong) or f"{len(rows)} kernels: no spill, within shared memory, products on tensor cores")
    return 1 if wrong else 0


def _updated(table: Table, rows: Sequence[Row]) -> Table:
    """Return the table with these rows updated, sorted by target and name."""
    updated = {target: dict(table.get(target, {})) for target in TARGETS}
    for row in rows:
        updated[row.target][row.name] = row.resources
    return {target: dict(sorted(found.items())) for target, found in updated.items() if found}


if __name__ == "__main__":
    sys.exit(main())
