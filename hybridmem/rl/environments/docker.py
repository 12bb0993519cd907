"""An environment in a Docker container of its own, as SWE-bench's are: a shell, files, and tests at the end.

    reset(image="swebench/sweb.eval.x86_64.…", test_command="pytest tests/test_a.py")
    bash("grep -rn 'def area' .")   open("shapes.py")   edit("shapes.py", 7, "    return w * h")   test()   submit()

The container has no network and limits of memory and processes. It is removed when the episode is judged, when the
environment begins anew, when it is gone, and by Docker itself when its lifetime is over, even if training was killed.
"""

import shutil
import subprocess
import weakref
from typing import Any

from hybridmem.checks import at_least

from .folders import with_line

DIRECTORY = "/testbed"  # where SWE-bench's images hold the repository
OPENED = 100  # lines at once
TOO_LONG = 124  # the exit status of timeout(1)


class ContainerError(RuntimeError):
    """Docker is not there, or does not do what an environment needs."""


class Container:
    """A container to act in, by TRL's conventions.

    Args:
        command_seconds: of what `bash` runs.
        test_seconds: of the tests.
        lifetime: seconds after which the container ends whatever happens.
        memory: of the container, as Docker writes it.
        processes: of the container.
        max_output: characters of what a command says; the middle of what is longer is left out.

    Raises:
        ContainerError: there is no `docker` command.
    """

    def __init__(
        self,
        command_seconds: int = 60,
        test_seconds: int = 600,
        lifetime: int = 7200,
        memory: str = "4g",
        processes: int = 512,
        max_output: int = 8000,
    ):
        at_least(1, command_seconds=command_seconds, test_seconds=test_seconds, processes=processes)
        at_least(test_seconds, lifetime=lifetime)
        at_least(2, max_output=max_output)
        if shutil.which("docker") is None:
            raise ContainerError(
                "environments in containers need the docker command, and it is not on PATH: install Docker, or choose "
                "a task that runs in hybridmem.sandbox.run, such as hybridmem.tasks.Repair"
            )
        self._seconds, self._test_seconds, self._lifetime = command_seconds, test_seconds, lifetime
        self._memory, self._processes, self._max_output = memory, processes, max_output
        self._remove: Any = None
        self.done = False

    def reset(
        self, image: str, test_command: str, test_patch: str = "", directory: str = DIRECTORY, **columns: Any
    ) -> None:
        """Start a container.

        Args:
            image: which one.
            test_command: what passes, with exit status 0, when the task is done.
            test_patch: changes to the repository, as git writes them, that bring the tests; none before the end.
            directory: where the repository is.
            columns: of the example, ignored.

        Raises:
            ContainerError: Docker cannot start it.
        """
        self._end()
        self._test_command, self._test_patch, self._directory = test_command, test_patch, directory
        self._reward, self.done = 0.0, False
        started = _docker(
            "run", "--detach", "--rm", "--init", "--network", "none", "--memory", self._memory,
            "--pids-limit", str(self._processes), "--security-opt", "no-new-privileges", "--workdir", directory,
            "--entrypoint", "sleep", image, str(self._lifetime), seconds=self._test_seconds,
        )  # fmt: skip
        if started.returncode:
            raise ContainerError(f"image={image!r} cannot be started: {started.stdout.strip()}")
        self._name = started.stdout.split()[-1]
        self._remove = weakref.finalize(self, _docker, "rm", "--force", self._name, seconds=self._seconds)

    def get_reward(self) -> float:
        """1 if the repository was submitted and its tests pass, with the changes that bring them."""
        return self._reward

    def bash(self, command: str) -> str:
        """Run a command in the repository's folder.

        Args:
            command: as a shell reads it.
        """
        return self._said(self._run(["bash", "-lc", command], self._seconds))

    def open(self, path: str, line: int = 1) -> str:
        """A hundred lines of a file, numbered.

        Args:
            path: the file's, from the repository's folder.
            line: the first one.
        """
        lines = self._read(path)[max(line, 1) - 1 :][:OPENED]
        return self._cut("\n".join(f"{number} {text}" for number, text in enumerate(lines, max(line, 1))))

    def edit(self, path: str, line: int, text: str = "") -> str:
        """Put a text in the place of a line.

        Args:
            path: the file's, from the repository's folder.
            line: the line's number, as `open` tells it.
            text: what stands there from now on, with its indentation; nothing takes the line away.
        """
        written = with_line(path, self._read(path), line, text)
        done = self._run(["sh", "-c", 'cat > "$1"', "sh", path], self._seconds, written)
        if done.returncode:
            raise ValueError(done.stdout.strip())
        return "edited"

    def test(self) -> str:
        """Run the tests that are there."""
        return self._said(self._tested())

    def submit(self) -> str:
        """Hand in the repository as it is, and end; this runs the tests."""
        self.done = True
        patched = self._run(["git", "apply", "-"], self._seconds, self._test_patch) if self._test_patch else None
        if patched is None or patched.returncode == 0:
            self._reward = float(self._tested().returncode == 0)
        self._end()
        return ""

    def _tested(self) -> subprocess.CompletedProcess[str]:
        return self._run(["bash", "-lc", self._test_command], self._test_seconds)

    def _read(self, path: str) -> list[str]:
        read = self._run(["cat", "--", path], self._seconds)
        if read.returncode:
            raise ValueError(read.stdout.strip())
        return read.stdout.splitlines()

    def _run(self, command: list[str], seconds: int, given: str = "") -> subprocess.CompletedProcess[str]:
        """A command in the container, ended there when its time is over."""
        limited = ["timeout", "--kill-after", "5", str(seconds), *command]
        where = ["--interactive", "--workdir", self._directory, self._name]
        return _docker("exec", *where, *limited, seconds=seconds + 30, given=given)

    def _said(self, done: subprocess.CompletedProcess[str]) -> str:
        ends = {0: "", TOO_LONG: "\n(its time was over)"}
        return self._cut(done.stdout.rstrip("\n")) + ends.get(done.returncode, f"\n(exit status {done.returncode})")

    def _cut(self, text: str) -> str:
        half, over = self._max_output // 2, len(text) - self._max_output
        return text if over <= 0 else f"{text[:half]}\n… ({over} characters left out)\n{text[-half:]}"

    def _end(self) -> None:
        if self._remove is not None:
            self._remove()


def _docker(*arguments: str, seconds: int, given: str = "") -> subprocess.CompletedProcess[str]:
    """Docker's command, what it says and what it complains of together."""
    settings: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        return subprocess.run(["docker", *arguments], input=given, timeout=seconds, check=False, **settings)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, TOO_LONG, stdout=f"docker {arguments[0]} took over {seconds} s")
