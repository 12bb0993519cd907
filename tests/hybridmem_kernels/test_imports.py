"""Imports within the kernels have no cycles, and operators import no tools."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels" / "hybridmem_kernels"


def imported(path: Path) -> set[Path]:
    """Return the kernels' files that a file imports by name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            inside = {folder / alias.name for alias in node.names}
            found |= {target.with_suffix(".py") for target in {*inside, folder}}
            found |= {folder / "__init__.py"} if not folder.with_suffix(".py").exists() else set()
    return {target for target in found if target.exists() and target != path}


GRAPH = {path: imported(path) for path in KERNELS.rglob("*.py")}


def test_there_are_no_cycles():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises a CycleError
    assert set(order) == set(GRAPH)
    assert order.index(KERNELS / "decays.py") < order.index(KERNELS / "memory_scan" / "chunked.py")


def test_nothing_but_tools_imports_tools():
    tools = KERNELS / "tools"
    users = {path for path, targets in GRAPH.items() if any(tools in target.parents for target in targets)}
    assert users
    assert all(tools in path.parents for path in users)
