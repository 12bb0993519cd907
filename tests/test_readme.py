"""Commands and links in README and guides."""

import os
import re
import runpy
import shlex
import subprocess
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from tests.hybridmem.models import tiny_model
from tests.hybridmem.training.runs import hybridmem

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_link_leads_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def lines() -> list[str]:
    """Return the commands in README and guides, one a line, without environment variables and torchrun."""
    pages = [README, *(page.read_text() for page in sorted((ROOT / "docs").rglob("*.md")))]
    blocks = "\n".join(block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, re.S))
    joined = blocks.replace("\\\n", " ").splitlines()
    return [re.sub(r"^(\w+=\S+ +(?=\S)|torchrun .* -m )", "", line) for line in joined]


def commands() -> list[list[str]]:
    """Return the `hybridmem` commands in README and guides with their options."""
    return [shlex.split(line, comments=True) for line in lines() if line.startswith("hybridmem ")]


def python_scripts() -> list[list[str]]:
    """Return the Python scripts that README and guides run, with their options."""
    found = [re.match(r"python (?:-m )?((?:scripts/|hybridmem_kernels\.).*)", line) for line in lines()]
    return [shlex.split(match[1], comments=True) for match in found if match]


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
    if "--ckpt_path" in options:  # written by an earlier command of the page
        at = options.index("--ckpt_path")
        del options[at : at + 2]
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, subcommand, *options, "--print_config")
    assert stopped.value.code == 0, capsys.readouterr().err


class Parsed(Exception):
    """Signal that a script has accepted its options."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("command", python_scripts(), ids=" ".join)
def test_scripts_accept_their_options(command, monkeypatch):
    """Every script whose command is published exists, and accepts the published options."""

    def parse(parser: ArgumentParser, *arguments):
        _parse(parser, *arguments)
        raise Parsed

    _parse = ArgumentParser.parse_args
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    monkeypatch.setattr("sys.argv", command)
    execute = runpy.run_path if command[0].endswith(".py") else runpy.run_module
    with pytest.raises(Parsed):
        execute(command[0], run_name="__main__")


def test_the_python_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    tiny_model().save_pretrained(tmp_path / "my_model")
    found: dict[str, Any] = {}
    exec(example.replace("my_model", str(tmp_path / "my_model")), found)
    assert found["out"].shape == found["v"].shape
    assert found["out"].isfinite().all()
    assert type(found["model"]).__name__ == "HybridMemForCausalLM"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_scripts_are_there_and_can_be_run():
    names = {line.split()[0] for line in lines() if line.startswith("scripts/")}
    assert "scripts/quickstart" in names
    for name in names:
        assert os.access(ROOT / name, os.X_OK), name


def test_old_python_is_named(tmp_path):
    """If the only Python is too old, the script prints a one-line error."""
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
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert out.returncode != 0
    assert "Python 3.11 or newer is required (found: Python 3.9.2)" in out.stderr
