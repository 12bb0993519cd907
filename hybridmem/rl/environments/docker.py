"""Docker environment in the style of SWE-bench, with a shell, file tools and final tests.

    reset(image="swebench/sweb.eval.x86_64.…", test_command="pytest tests/test_a.py")
    bash("grep -rn 'def area' .")   open("shapes.py")   edit("shapes.py", 7, "    return w * h")   test()   submit()

The container has no network, and limits on memory and processes. It is removed after submission, on the next reset, and
when the environment is garbage-collected. If training is killed, Docker removes it at the end of its lifetime.
"""

import shutil
import subprocess
import weakref
from typing import Any

from hybridmem.checks import at_least

from .folders import with_line

DIRECTORY = "/testbed"  # the repository's folder in SWE-bench's images
OPENED = 100  # lines that `open` shows
TOO_LONG = 124  # the exit status of timeout(1)


class ContainerError(RuntimeError):
    """Error for a missing docker command, or a container that cannot be started."""


class Container:
    """Environment in a Docker container, with TRL's interface.

    Args:
        command_seconds: time limit of a `bash` command.
        test_seconds: time limit of the tests.
        lifetime: seconds until the container stops unconditionally.
        memory: the container's memory limit in Docker's notation.
        processes: the container's maximum number of processes.
        max_output: the maximum number of characters of a command's output; longer output is cut in the middle.

    Raises:
        ContainerError: The `docker` command is missing.
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
                "the docker command is not on PATH: install Docker, or choose a task that runs in "
                "hybridmem.sandbox.run, such as hybridmem.tasks.Repair"
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
            image: the Docker image.
            test_command: the command that exits with status 0 if the task is solved.
            test_patch: a git patch that adds the tests; it is applied on submission only.
            directory: the repository's folder.
            columns: further columns of the example, ignored.

        Raises:
            ContainerError: Docker cannot start the image.
        """
        self._end()
        self._test_command, self._test_patch, self._directory = test_command, test_patch, directory
        self._reward, self.done = 0.0, False
        limits = ["--network", "none", "--memory", self._memory, "--pids-limit", str(self._processes)]
        options = ["--detach", "--rm", "--init", *limits, "--security-opt", "no-new-privileges", "--workdir", directory]
        command = ["--entrypoint", "sleep", image, str(self._lifetime)]
        started = _docker("run", *options, *command, seconds=self._test_seconds)
        if started.returncode:
            raise ContainerError(f"cannot start image={image!r}: {started.stdout.strip()}")
        self._name = started.stdout.split()[-1]
        self._remove = weakref.finalize(self, _docker, "rm", "--force", self._name, seconds=self._seconds)

    def get_reward(self) -> float:
        """Return 1 if the submitted repository passes its tests with test_patch applied, else 0."""
        return self._reward

    def bash(self, command: str) -> str:
        """Run a command in the repository's folder.

        Args:
            command: the shell command.
        """
        return self._said(self._run(["bash", "-lc", command], self._seconds))

    def open(self, path: str, line: int = 1) -> str:
        """Return a hundred numbered lines of a file.

        Args:
            path: the file's path, relative to the repository's folder.
            line: the first line to show.
        """
        lines = self._read(path)[max(line, 1) - 1 :][:OPENED]
        return self._cut("\n".join(f"{number} {text}" for number, text in enumerate(lines, max(line, 1))))

    def edit(self, path: str, line: int, text: str = "") -> str:
        """Replace a line of a file.

        Args:
            path: the file's path, relative to the repository's folder.
            line: the line's number, as shown by `open`.
            text: the new text with its indentation; an empty text deletes the line.
        """
        written = with_line(path, self._read(path), line, text)
        done = self._run(["sh", "-c", 'cat > "$1"', "sh", path], self._seconds, written)
        if done.returncode:
            raise ValueError(done.stdout.strip())
        return "edited"

    def test(self) -> str:
        """Run the tests in their current state."""
        return self._said(self._tested())

    def submit(self) -> str:
        """Submit the repository, run its tests and end the episode."""
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
        """Run a command in the container with a time limit."""
        limited = ["timeout", "--kill-after", "5", str(seconds), *command]
        where = ["--interactive", "--workdir", self._directory, self._name]
        return _docker("exec", *where, *limited, seconds=seconds + 30, given=given)

    def _said(self, done: subprocess.CompletedProcess[str]) -> str:
        ends = {0: "", TOO_LONG: "\n(timed out)"}
        return self._cut(done.stdout.rstrip("\n")) + ends.get(done.returncode, f"\n(exit status {done.returncode})")

    def _cut(self, text: str) -> str:
        half, over = self._max_output // 2, len(text) - self._max_output
        return text if over <= 0 else f"{text[:half]}\n… ({over} characters left out)\n{text[-half:]}"

    def _end(self) -> None:
        if self._remove is not None:
            self._remove()


def _docker(*arguments: str, seconds: int, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run a docker command, with stdout and stderr merged."""
    settings: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        return subprocess.run(["docker", *arguments], input=given, timeout=seconds, check=False, **settings)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, TOO_LONG, stdout=f"docker {arguments[0]} took over {seconds} s")
