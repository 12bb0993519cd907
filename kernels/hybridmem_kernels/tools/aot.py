"""Ahead-of-time builds of every Triton kernel, for GPUs that need not be there, and the resources they use.

    python -m hybridmem_kernels.tools.aot                       # build, print the table, compare it with resources.json
    python -m hybridmem_kernels.tools.aot --write               # accept the table
    python -m hybridmem_kernels.tools.aot --targets sm90 --dtypes bf16 --match memory_scan

The shapes are those of the model configurations in configs/pretrain. A kernel that spills registers, needs more shared
memory than the target has, multiplies matrices without tensor cores, or takes more than the committed table says, is
an error. Triton keeps what it has built: the same kernel is not built again.
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

# Kernels under the interpreter cannot be built; and this default differs between releases of Triton.
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
    """A GPU to build for."""

    gpu: GPUTarget
    tensor_core: str  # its instructions for matrix products


TARGETS = {
    "sm80": Target(GPUTarget("cuda", 80, 32), r"\bmma\.sync"),
    "sm90": Target(GPUTarget("cuda", 90, 32), r"\b(?:wgmma\.mma_async|mma\.sync)"),
    "sm100": Target(GPUTarget("cuda", 100, 32), r"\b(?:tcgen05\.mma|mma\.sync)"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), r"\bv_mfma"),
}


@dataclass(frozen=True)
class Shapes:
    """Sizes in a model's configuration that kernels are compiled for."""

    head_dim: int
    memory_head_dim: int
    memory_chunk_size: int
    memory_widths: tuple[int, ...]  # of a deep memory

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shapes":
        """Read the `config` block of a configuration; where it says nothing, HybridMemConfig's defaults hold."""
        dim, depth = config.get("memory_head_dim", 64), max(2, config.get("memory_depth", 1))
        hidden = dim * config.get("memory_expansion", 1)
        widths = (dim, *[hidden] * (depth - 1), dim)
        return cls(config.get("head_dim", 64), dim, config.get("memory_chunk_size", 64), widths)

    def builds(self, dtype: torch.dtype, hip: bool) -> list[Build]:
        """Every kernel of every operator."""
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
    """The shapes of training configurations, each once."""
    configs = [yaml.safe_load(path.read_text())["model"]["init_args"]["config"] for path in paths]
    return list(dict.fromkeys(Shapes.of(config) for config in configs))


def list_builds(
    targets: Sequence[str], shapes: Sequence[Shapes], dtypes: Sequence[str], match: str
) -> list[tuple[str, Build]]:
    """(target, build) of all that is asked for, each once."""
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
    """Build a kernel (or take it from Triton's cache) and read off what it takes."""
    options = dict(num_warps=build.num_warps, num_stages=build.num_stages)
    if build.maxnreg is not None:
        options["maxnreg"] = build.maxnreg
    source = ASTSource(build.kernel, build.signature, build.constexprs, _alignments(build))
    kernel = triton.compile(source, target=target.gpu, options=options)
    read = _read_amdgcn if target.gpu.backend == "hip" else _read_cubin
    registers, spills, assembly = read(kernel.asm)
    return Resources(registers, spills, kernel.metadata.shared, len(re.findall(target.tensor_core, assembly)))


def _alignments(build: Build) -> dict[tuple[int, ...], list[list[Any]]]:
    """Return what a launch finds out by itself: tensors, and strides of their rows, are multiples of 16 bytes."""
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
    """(registers, bytes spilled, assembly)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], asm["ptx"]


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, str]:
    """(vector registers, bytes spilled, assembly)."""
    assembly = asm["amdgcn"]
    usage = {name: int(number) for name, number in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    # Scratch memory holds what was spilled of either kind of register.
    return usage["vgpr_count"], usage["private_segment_fixed_size"], assembly


_builds: list[tuple[str, Build]] = []  # of this worker; kernels cannot be sent to it


def _start_worker(arguments: tuple[Any, ...]) -> None:
    _builds.extend(list_builds(*arguments))


def _measure_nth(n: int) -> Resources:
    target, build = _builds[n]
    return measure(TARGETS[target], build)


def measure_all(arguments: tuple[Any, ...], jobs: int) -> list[Row]:
    """Every one of `list_builds(*arguments)`, printed as it is done."""
    builds, rows = list_builds(*arguments), []
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (arguments,)) as pool:
        for (target, build), resources in zip(builds, pool.map(_measure_nth, range(len(builds))), strict=True):
            rows.append(Row(target, build.name, build.has_dots, resources))
            numbers = "".join(f"{number:>10}" for number in astuple(resources))
            print(f"{target:8}{build.name:74}{build.num_warps:>5}{numbers}", flush=True)
    return rows


def main(command_line: Sequence[str] | None = None) -> int:
    """Build, print, compare; 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridmem_kernels.tools.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--configs", nargs="+", type=Path, default=sorted(CONFIGS.glob("*.yaml")))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(NAMED_DTYPES), default=["bf16", "fp32"])
    parser.add_argument("--match", default="", help="regular expression that a kernel's name must hold")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true", help="put what was built into resources.json")
    arguments = parser.parse_args(command_line)
    what = (arguments.targets, shapes_of(arguments.configs), arguments.dtypes, arguments.match)
    if not list_builds(*what):
        parser.error("no kernel is asked for: check --configs and --match")
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
    """The table with these rows in it, in the order of targets and names."""
    updated = {target: dict(table.get(target, {})) for target in TARGETS}
    for row in rows:
        updated[row.target][row.name] = row.resources
    return {target: dict(sorted(found.items())) for target, found in updated.items() if found}


if __name__ == "__main__":
    sys.exit(main())
