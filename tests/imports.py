"""Import graph of both packages from their source, type-only and local imports included."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"hybridmem_kernels": ROOT / "kernels", "hybridmem": ROOT}


@cache
def modules() -> dict[str, Path]:
    """Return every module's file by its dotted name; the name of a package maps to its __init__.py."""
    found = {}
    for package, base in PACKAGES.items():
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_package(module: str) -> bool:
    """Return True if a module is an __init__.py."""
    return modules()[module].name == "__init__.py"


@cache
def imported_names(module: str) -> tuple[tuple[str, str | None], ...]:
    """Return (module, name) of all imports in a file from the two packages; `import x` has name None."""
    found: list[tuple[str, str | None]] = []
    package = module.split(".") if is_package(module) else module.split(".")[:-1]
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found += [(source, alias.name) for alias in node.names if source in modules()]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names if alias.name in modules()]
    return tuple(found)


def definition(source: str, name: str | None) -> str:
    """Return the module that defines a name, following re-exports of packages."""
    if name is None:
        return source
    if is_package(source):
        for origin, exported in imported_names(source):
            if exported == name and origin != source:
                return definition(origin, name)
        if f"{source}.{name}" in modules():
            return f"{source}.{name}"
    return source


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules that define a module's imported names."""
    return frozenset(definition(*each) for each in imported_names(module)) - {module}


@cache
def longest_chain(module: str) -> tuple[str, ...]:
    """Return the longest chain of imports that starts at a module and stays in its package.

    Raises:
        RecursionError: The imports form a cycle.
    """
    package = module.split(".")[0]
    chains = (longest_chain(other) for other in imports(module) if other.split(".")[0] == package)
    return (module, *max(chains, key=len, default=()))
