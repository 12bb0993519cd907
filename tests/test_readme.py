"""README's commands run and its tree is true."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.hybridmem.training.runs import hybridmem

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TREE = re.findall(r"```\n(kernels/.*?)```", README, re.S)[0]


def tracked(pattern: str) -> set[str]:
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", pattern], cwd=ROOT, capture_output=True, text=True
    )
    return {name for name in out.stdout.split() if (ROOT / name).exists()}


def tree_paths() -> list[str]:
    """The paths that the tree's indentation spells."""
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


def test_the_tree_names_every_file_and_no_other():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of files to compare with")
    code = {name for pattern in ("*.py", "configs/*", "scripts/*") for name in tracked(pattern)}
    code = {name for name in code if not name.startswith("tests/") and not name.endswith("__init__.py")}
    assert sorted(tree_paths()) == sorted(code)
    assert all(len(line.split(maxsplit=1)) == 2 or line.strip().endswith("/") for line in TREE.splitlines())


def test_every_link_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def commands() -> list[list[str]]:
    """The `hybridmem` commands of README and guides, options and all."""
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    blocks = "\n".join(block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, re.S))
    lines = blocks.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("hybridmem ")]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    subcommand, options = command[1], command[2:]
    if subcommand in ("export", "consolidate", "generate", "subnetwork", "report"):
        monkeypatch.setattr("hybridmem.cli.main.COMMANDS", {subcommand: lambda **_: None})
        with pytest.raises(SystemExit) as stopped:
            hybridmem(monkeypatch, subcommand, "--help")
        assert stopped.value.code == 0
        return
    options = ["configs/quickstart.yaml" if option == "C" else option for option in options]
    if "--ckpt_path" in options:  # made by an earlier command of the page
        at = options.index("--ckpt_path")
        del options[at : at + 2]
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, subcommand, *options, "--print_config")
    assert stopped.value.code == 0, capsys.readouterr().err


def test_scripts_are_there_and_can_be_run():
    for name in re.findall(r"^(scripts/\S+)", README, re.M):
        assert os.access(ROOT / name, os.X_OK), name


def test_old_python_is_named(tmp_path):
    """A machine whose only Python is too old is told so, in one line."""
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\ncase $1 in --version) echo Python 3.9.2;; *) exit 1;; esac\n")
    fake.chmod(0o755)
    tools = {tool: f"/usr/bin/{tool}" for tool in ("dirname", "bash", "df", "awk", "sed", "cat", "env")}
    for tool, path in tools.items():
        (tmp_path / tool).symlink_to(path if Path(path).exists() else f"/bin/{tool}")
    for candidate in ("python3.11", "python3.12", "python3.13"):
        (tmp_path / candidate).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / candidate).chmod(0o755)
    checkout = tmp_path / "checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("common.sh", "test"):
        (checkout / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    out = subprocess.run(
        [tools["bash"] if Path(tools["bash"]).exists() else "/bin/bash", str(checkout / "scripts" / "test")],
        capture_output=True, text=True, env={"PATH": str(tmp_path)},
    )  # fmt: skip
    assert out.returncode != 0
    assert "Python 3.11 or newer is needed (found: Python 3.9.2)" in out.stderr
