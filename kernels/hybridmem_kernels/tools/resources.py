"""Resources of built kernels, their limits, and their committed table (resources.json).

Each version of Triton has its own table, because versions allocate registers differently. Growth is detected only
within a version.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("resources.json")
KILOBYTE = 1024
# Maximum shared memory of a block, in bytes.
SHARED_LIMITS = {"sm80": 163 * KILOBYTE, "sm90": 227 * KILOBYTE, "sm100": 227 * KILOBYTE, "gfx942": 64 * KILOBYTE}


@dataclass(frozen=True)
class Resources:
    """Resources of a built kernel."""

    registers: int  # per thread
    spills: int  # bytes of spilled registers per thread
    shared: int  # bytes of shared memory per block
    tensor_core: int  # number of matrix product instructions


@dataclass(frozen=True)
class Row:
    """Kernel built for a target; `has_dots` means that it multiplies matrices and must use tensor cores."""

    target: str
    name: str
    has_dots: bool
    resources: Resources


Table = dict[str, dict[str, Resources]]  # by target, then by kernel


def problems(rows: Sequence[Row], committed: Table | None) -> list[str]:
    """Describe every violation; `committed` is the table of the current version of Triton, or None if missing."""
    found = []
    for row in rows:
        place, resources, limit = f"{row.target} {row.name}", row.resources, SHARED_LIMITS[row.target]
        if resources.spills:
            found.append(f"{place}: spills {resources.spills} bytes of registers per thread")
        if resources.shared > limit:
            found.append(f"{place}: needs {resources.shared} bytes of shared memory, but {limit} are available")
        if row.has_dots and not resources.tensor_core:
            found.append(f"{place}: multiplies matrices without tensor cores")
        if committed is not None:
            found += [f"{place}: {change}; accept it with --write" for change in _growth(row, committed)]
    return found


def _growth(row: Row, committed: Table) -> list[str]:
    before = committed.get(row.target, {}).get(row.name)
    if before is None:
        return [f"not in {TABLE.name}"]
    pairs = [(name, getattr(before, name), getattr(row.resources, name)) for name in ("registers", "spills", "shared")]
    return [f"{name} grew from {was} to {now}" for name, was, now in pairs if now > was]


def read_tables(path: Path = TABLE) -> dict[str, Table]:
    """Read the tables by version of Triton."""
    if not path.exists():
        return {}
    return {
        version: {target: {name: Resources(**row) for name, row in rows.items()} for target, rows in table.items()}
        for version, table in json.loads(path.read_text()).items()
    }


def write_tables(tables: dict[str, Table], path: Path = TABLE) -> None:
    """Write the tables with one kernel per line, so that a diff shows the changed kernels."""
    versions = []
    for version, table in sorted(tables.items()):
        targets = []
        for target, rows in table.items():
            lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(asdict(row))}" for name, row in rows.items())
            targets.append(f'  "{target}": {{\n{lines}\n  }}')
        versions.append(f' "{version}": {{\n' + ",\n".join(targets) + "\n }")
    path.write_text("{\n" + ",\n".join(versions) + "\n}\n")
