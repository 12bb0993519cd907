"""The tree in docs/architecture.md lists every file, imports only go up in it, and import chains are short."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from .imports import ROOT, imports, is_package, longest_chain, modules

PAGE = ROOT / "docs" / "architecture.md"
TREE = re.findall(r"```\n(kernels/.*?)```", PAGE.read_text(), re.S)[0]
MOST_MODULES = 14  # per folder
LONGEST_CHAIN = 12  # modules, within a package


def tracked(pattern: str) -> set[str]:
    """Return all files that git tracks or does not ignore."""
    command = ["git", "ls-files", "-co", "--exclude-standard", pattern]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {name for name in out.stdout.split() if (ROOT / name).exists()}


def tree_paths() -> list[str]:
    """Return the files in the tree, in its order."""
    folders: list[tuple[int, str]] = []
    paths = []
    for line in TREE.rstrip().splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        path = "".join(folder for _, folder in folders) + name
        if name.endswith("/"):
            folders.append((indent, name))
        else:
            paths.append(path)
    return paths


PLACES = {path.removeprefix("kernels/"): place for place, path in enumerate(tree_paths())}


def place(module: str) -> int | None:
    """Return a module's position in the tree, which omits __init__.py."""
    return PLACES.get(module.replace(".", "/") + ".py")


def test_the_tree_names_every_file_and_no_other():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of files to compare with")
    code = {name for pattern in ("*.py", "configs/*", "scripts/*", "examples/*") for name in tracked(pattern)}
    code = {name for name in code if not name.startswith("tests/") and not name.endswith("__init__.py")}
    assert sorted(tree_paths()) == sorted(code)
    assert all(len(line.split(maxsplit=1)) == 2 for line in TREE.splitlines())


@pytest.mark.parametrize("module", modules())
def test_a_file_imports_only_from_files_above_it(module):
    mine = place(module)
    below = [other for other in imports(module) if (theirs := place(other)) is not None and mine and theirs > mine]
    assert not below, f"{module} imports from files below it in docs/architecture.md: {below}"


@pytest.mark.parametrize("module", modules())
def test_packages_export_names_of_their_own_folder_or_above(module):
    """An __init__.py is not in the tree and counts as its folder's last file."""
    if not is_package(module) or module in ("hybridmem", "hybridmem_kernels"):
        return
    own = [theirs for other in modules() if other.startswith(f"{module}.") and (theirs := place(other)) is not None]
    for other in imports(module):
        assert (place(other) or 0) <= max(own, default=0), f"{module} exports {other} from below it"


def test_imports_form_no_cycle_and_no_long_chain():
    chain = max((longest_chain(module) for module in modules()), key=len)
    assert len(chain) <= LONGEST_CHAIN, " > ".join(chain)


def test_folders_are_small():
    folders = Counter(Path(path).parent for module, path in modules().items() if not is_package(module))
    assert {str(folder): count for folder, count in folders.items() if count > MOST_MODULES} == {}


def test_tools_are_imported_by_nothing():
    for module in modules():
        if not module.startswith("hybridmem_kernels.tools"):
            assert not any(other.startswith("hybridmem_kernels.tools") for other in imports(module)), module
