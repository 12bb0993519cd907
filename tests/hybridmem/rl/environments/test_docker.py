"""Docker environment, with a fake docker command that uses one folder per container and logs its calls."""

import gc
import os
import sys
from pathlib import Path

import pytest

from hybridmem.rl.environments.docker import Container, ContainerError
from hybridmem.rl.environments.tools import act, tools_of

# `run` creates the container's folder, `exec` runs a command in it, and `rm` deletes it.
DOCKER = """#!{python} -IS
import os, shutil, subprocess, sys
home, arguments = {home!r}, sys.argv[1:]
with open(home + "/calls", "a") as calls:
    calls.write(" ".join(arguments) + "\\n")
def value(name):
    return arguments[arguments.index(name) + 1]
if arguments[0] == "run":
    if "missing" in arguments:
        sys.exit("Unable to find image 'missing' locally")
    name = "c" + str(len(os.listdir(home + "/containers")))
    shutil.copytree(home + "/image", home + "/containers/" + name)
    print("pulling …\\n" + name)
elif arguments[0] == "exec":
    at = arguments.index(value("--workdir")) + 1
    sys.exit(subprocess.run(arguments[at + 1 :], cwd=home + "/containers/" + arguments[at]).returncode)
elif arguments[0] == "rm":
    shutil.rmtree(home + "/containers/" + arguments[-1])
"""
EXAMPLE = {"image": "repository:1", "test_command": "test $(sh area.sh 2 3) = 6", "prompt": "area is wrong"}


@pytest.fixture
def docker(tmp_path, monkeypatch) -> Path:
    """Install the fake docker command and return its folder."""
    for folder in ("bin", "containers", "image"):
        (tmp_path / folder).mkdir()
    (tmp_path / "image" / "area.sh").write_text("# area of a rectangle\necho $(($1 + $2))\n")
    command = tmp_path / "bin" / "docker"
    command.write_text(DOCKER.format(python=os.path.realpath(sys.executable), home=str(tmp_path)))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return tmp_path


def containers(docker: Path) -> list[str]:
    return os.listdir(docker / "containers")


def calls(docker: Path) -> list[str]:
    return (docker / "calls").read_text().splitlines()


@pytest.fixture
def container(docker):
    container = Container(command_seconds=2, max_output=200)
    container.reset(**EXAMPLE)
    return container


def say(container, turn) -> str:
    return act(container, turn, "plain", 10_000).observation


def test_a_repository_is_read_changed_tested_and_judged(container, docker):
    assert say(container, "bash ls") == "area.sh"
    assert say(container, "open area.sh 2") == "2 echo $(($1 + $2))"
    assert say(container, "test") == "\n(exit status 1)"
    assert say(container, "edit area.sh 2 echo $(($1 * $2))") == "edited"
    assert say(container, "test") == ""
    assert container.get_reward() == 0
    assert act(container, "submit", "plain", 100).ended
    assert container.get_reward() == 1
    assert containers(docker) == []


def test_failed_tests_earn_nothing(container, docker):
    say(container, "submit")
    assert container.get_reward() == 0
    assert containers(docker) == []


def test_a_container_has_no_network_and_limits_and_ends_by_itself(container, docker):
    started = calls(docker)[0]
    assert started.startswith("run --detach --rm --init --network none --memory 4g --pids-limit 512")
    assert started.endswith("--workdir /testbed --entrypoint sleep repository:1 7200")


def test_tests_come_at_the_end(docker):
    container = Container()
    patch = "--- /dev/null\n+++ b/tested.sh\n@@ -0,0 +1 @@\n+exit 0\n"
    container.reset(image="repository:1", test_command="sh tested.sh", test_patch=patch)
    assert "exit status" in say(container, "test")
    say(container, "submit")
    assert container.get_reward() == 1


def test_a_patch_that_does_not_fit_earns_nothing(docker):
    container = Container()
    container.reset(image="repository:1", test_command="true", test_patch="no patch")
    say(container, "submit")
    assert container.get_reward() == 0


def test_slow_commands_time_out(container):
    assert say(container, "bash sleep 60") == "\n(timed out)"


def test_long_output_is_cut(container):
    said = say(container, "bash head -c 1000 /dev/zero | tr '\\0' x")
    assert len(said) < 250
    assert "(800 characters left out)" in said


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ("open none.sh", "No such file"),
        ("edit none.sh 1 x", "No such file"),
        ("edit area.sh 3 x", "lines 1 to 2, but line is 3"),
        ("edit area.sh 0 x", "lines 1 to 2, but line is 0"),
    ],
)
def test_mistakes_are_reported(container, turn, said):
    assert said in say(container, turn)


def test_the_container_is_removed_with_its_environment_and_before_the_next_one(docker):
    container = Container()
    container.reset(**EXAMPLE)
    container.reset(**EXAMPLE)
    assert sum(call.startswith("rm --force") for call in calls(docker)) == 1
    assert len(containers(docker)) == 1
    del container
    gc.collect()
    assert containers(docker) == []


def test_an_image_that_is_not_there_is_named(docker):
    with pytest.raises(ContainerError, match="cannot start image='missing': Unable to find image"):
        Container().reset(image="missing", test_command="true")


def test_a_missing_docker_command_raises(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ContainerError, match="the docker command is not on PATH"):
        Container()


def test_its_tools(docker):
    assert set(tools_of(Container())) == {"bash", "open", "edit", "test", "submit"}
