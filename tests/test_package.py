"""Contents of the wheel, as of the checkout: both packages, their type markers and the operators' derivations."""

import importlib
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import hybridmem

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_carries_both_packages(tmp_path):
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    copied = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in tracked.stdout.splitlines() if (ROOT / name).is_file()]
    if not names:
        pytest.skip("not a git checkout: there is no list of files to build from")
    for name in names:
        target = copied / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=copied, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    held = set(archive.namelist())
    wanted = {
        name.removeprefix("kernels/") for name in names if re.match(r"(kernels/hybridmem_kernels|hybridmem)/", name)
    }
    assert wanted <= held
    assert not any(name.startswith(("tests/", "kernels/", "scripts/")) for name in held)
    assert {"hybridmem/py.typed", "hybridmem_kernels/py.typed"} <= held
    (about,) = (name.removesuffix("/METADATA") for name in held if name.endswith("/METADATA"))
    assert about == f"hybridmem-{hybridmem.__version__}.dist-info"
    assert f"{about}/licenses/LICENSE" in held
    assert "hybridmem = hybridmem.cli.main:main" in archive.read(f"{about}/entry_points.txt").decode()


def test_importing_the_kernels_needs_nothing_of_hybridmem():
    others = ("hybridmem", "transformers", "lightning")
    code = f"import sys, hybridmem_kernels; assert not any(n.split('.')[0] in {others} for n in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_public_names_exist():
    for name in (
        "hybridmem",
        "hybridmem_kernels",
        "hybridmem.convert",
        "hybridmem.data",
        "hybridmem.metrics",
        "hybridmem.rl",
        "hybridmem.tasks",
        "hybridmem.training",
    ):
        module = importlib.import_module(name)
        for public in module.__all__:
            assert getattr(module, public).__doc__, f"{name}.{public}"


def test_the_changelog_has_a_section_of_this_version():
    assert re.search(rf"^## {re.escape(hybridmem.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_every_dependency_is_pinned():
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    for requirement in requires("hybridmem") or []:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")
        assert name in pins or name in ("hybridmem", "flash-attn", "triton"), requirement
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, pin = line.partition("==")
        if name in ("torch", "transformers", "lightning"):
            assert version(name).split("+")[0] == pin


def test_scripts_do_not_hold_paths_of_a_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        if name.endswith((".py", ".md", ".yaml", ".toml", ".sh")) or os.access(ROOT / name, os.X_OK):
            text = (ROOT / name).read_text(errors="replace")
            assert not re.search(r"/(root|home/\w+|work)/", text), name
