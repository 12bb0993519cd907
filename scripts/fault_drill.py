"""Injects faults into small training runs, and checks that they resume bit for bit or report the cause.

    python scripts/fault_drill.py --kills 50 --output docs/data/reliability.json

Every run is a fork of this process, which has imported everything. All losses and the final weights are compared with a
reference run without faults.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from hybridmem import HybridMemConfig, HybridMemForCausalLM
from hybridmem.cli.main import main as hybridmem
from hybridmem.data.trainer_state import batches_trained
from hybridmem.tasks.task import Split
from hybridmem.training.checkpoints.durable import PART, newest_good, read_checkpoint, to_go_on_from
from hybridmem.training.checkpoints.loading import load_checkpoint

STARTS_BY_KILLS = 10  # kills of one run before it may finish
ACCUMULATED = 3  # batches per optimiser step in the drill of gradient accumulation
WAITING_STEPS = 8  # optimiser steps of the drill of dynamic sampling
FAULTS = ("kill", "drop", "terminate", "within", "wait", "fill", "tmpfs", "damage", "spoil", "corrupt")
STUCK = 600  # seconds after which an unfinished process counts as a failure
GLOO = {"process_group_backend": "gloo"}
SEVERAL: dict[str, dict[str, Any]] = {
    "DDP": {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": GLOO},
    "FSDP2": {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, **GLOO},
    },
}


class LossLog(L.Callback):
    """Callback that writes a metric of every batch to a file, without rounding."""

    def __init__(self, path: str, metric: str = "train/loss"):
        self.path, self.metric = path, metric

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Append a line immediately, because the process may be killed at any time."""
        if not trainer.is_global_zero:
            return
        line = f"{batches_trained(trainer)} {float(trainer.callback_metrics[self.metric]).hex()}\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, line.encode())
        os.close(descriptor)


class NoNumbers(L.Callback):
    """Callback that turns one batch's embeddings into NaN."""

    def __init__(self, step: int):
        self.step = step

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Add a hook to the embeddings."""
        embeddings = pl_module.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda _, __, out: out * self.factor(trainer))

    def factor(self, trainer: L.Trainer) -> float:
        """Return NaN in the chosen batch and 1 in all others."""
        return float("nan") if trainer.global_step == self.step and trainer.training else 1.0


class BrokenBatch(L.Callback):
    """Callback that raises an error in the forward or backward pass of one batch."""

    def __init__(self, batch: int, backward: bool):
        self.batch, self.backward = batch, backward

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Add a hook that fails to the chosen batch."""
        if batches_trained(trainer) == self.batch:
            layer = pl_module.model.model.layers[0].feed_forward.down_proj
            register = layer.register_full_backward_hook if self.backward else layer.register_forward_hook
            register(self.fail)

    def fail(self, *_: Any) -> None:
        """Raise an error."""
        raise RuntimeError("a fault of the drill")


class FullDisk(L.Callback):
    """Callback that limits the size of files from a step on."""

    def __init__(self, step: int, size: int):
        self.step, self.size = step, size

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Set the limit at the chosen step."""
        if trainer.global_step == self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Rare:
    """Task in which few groups of responses have different rewards."""

    @property
    def max_completion_length(self) -> int:
        """Return room for two letters."""
        return 2

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return a prompt of a few letters."""
        return {"prompt": chr(97 + index % 26) * 3, "answer": "a"}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Return 1 for one of five first letters."""
        return [float(bool(text) and ord(text[0]) % 5 == 0) for text in completions]


class Drill:
    """Small run that can be started repeatedly in a folder, with two processes if a strategy is given.

    Args:
        work: folder of the runs.
        seed: seed of the random faults.
        batches: number of batches of a run.
        strategy: Lightning strategy of two processes; None trains in one.
        accumulate: batches per optimiser step.
        waiting: True for reinforcement learning in which groups of responses wait for a full batch.
    """

    def __init__(
        self,
        work: Path,
        seed: int,
        batches: int,
        strategy: dict[str, Any] | None = None,
        accumulate: int = 1,
        waiting: bool = False,
    ):
        self.work, self.random, self.strategy = work, random.Random(seed), strategy
        self.steps, self.accumulate, self.waiting = batches // accumulate, accumulate, waiting
        self.others: list[int] = []  # all processes except the first
        self.text = work / "text"
        work.mkdir(exist_ok=True)
        self.counts: dict[str, Counter[str]] = {}
        self.failures: list[str] = []
        self.write_text()
        if waiting:
            write_policy(work / "policy")
        begun = time.monotonic()
        reference = self.folder("reference")
        if self.wait(self.start(reference)) != 0:
            raise SystemExit(f"the reference run without faults failed: {self.said(reference)}")
        self.seconds = time.monotonic() - begun
        self.losses = dict(line.split() for line in (reference / "losses.txt").read_text().splitlines())
        self.weights = load_checkpoint(reference / "last.ckpt")["state_dict"]
        assert waiting or len(self.losses) == self.steps * accumulate

    def write_text(self) -> None:
        """Write the training text."""
        self.text.mkdir(exist_ok=True)
        for n in range(12):
            (self.text / f"{n}.txt").write_text(f"value_{n} = {n * 7919} # line\n" * (20 + n))

    def folder(self, name: str) -> Path:
        """Create an empty folder for a run."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def start(self, folder: Path, *options: str, callbacks: tuple[dict[str, Any], ...] = ()) -> int:
        """Start or resume the run, and return the first process's ID."""
        log = {"path": str(folder / "losses.txt"), "metric": "reward" if self.waiting else "train/loss"}
        added = [{"class_path": f"{__name__}.LossLog", "init_args": log}, *callbacks]
        config = folder / "config.yaml"
        if self.waiting:
            chosen = waiting_settings(folder, self.work / "policy", added, self.strategy)
        else:
            chosen = settings(folder, self.text, self.steps, added, self.strategy, self.accumulate)
        config.write_text(yaml.safe_dump(chosen))
        arguments = ["hybridmem", "fit", "--config", str(config), *options]
        if self.strategy is None:
            return self.fork(folder / "output.txt", arguments, {})
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = found.getsockname()[1]
        group = dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, GROUP_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        group |= {"TORCHELASTIC_RUN_ID": "drill"}  # as set by torchrun
        first, *self.others = [
            self.fork(folder / name, arguments, group | {"RANK": rank, "LOCAL_RANK": rank})
            for rank, name in enumerate(("output.txt", "output_of_second.txt"))
        ]
        return first

    def fork(self, said: Path, arguments: list[str], environment: dict[str, Any]) -> int:
        """Run a command in a forked process, and return its ID."""
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        code = 70
        try:
            os.environ |= {name: str(value) for name, value in environment.items()}
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)  # replaces redirected streams
            sys.argv = arguments
            hybridmem()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 70
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, process: int) -> int:
        """Wait for all processes, and return the first one's exit status, or minus the signal that ended it."""
        code = self.end_of(process)
        while self.others:
            other = self.others.pop()
            if code < 0:  # torchrun also ends the others, which may wait for the first one to join them
                os.kill(other, signal.SIGKILL)
            self.end_of(other)
        return code

    def end_of(self, process: int) -> int:
        """Wait for a process, or kill it if it is stuck, and return its exit status."""
        deadline = time.monotonic() + STUCK
        while time.monotonic() < deadline:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return 124

    def said(self, folder: Path) -> str:
        """Return the last line of a run's output."""
        lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def newest(self, folder: Path) -> list[str]:
        """Return the options that resume a run from its newest checkpoint."""
        others = sorted(folder.glob("within*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        checkpoint = to_go_on_from(folder) or next(reversed(others), None)
        return [] if checkpoint is None else ["--ckpt_path", str(checkpoint)]

    def count(self, fault: str, what: str) -> None:
        """Count the outcome of a fault."""
        self.counts.setdefault(fault, Counter())[what] += 1

    def check(self, fault: str, good: bool, what: str) -> bool:
        """Record a failure unless `good`."""
        if not good:
            self.count(fault, "failed")
            self.failures.append(f"{fault}: {what}")
        return good

    def same_so_far(self, fault: str, folder: Path) -> bool:
        """Check that all losses so far match the reference, and that all checkpoints are intact."""
        log = folder / "losses.txt"
        lines = log.read_text().splitlines() if log.exists() else []
        other = [line for line in lines if self.losses.get(line.split()[0]) != line.split()[1]]
        broken = []
        for path in folder.glob("*.ckpt"):
            try:
                load_checkpoint(path)
            except ValueError as error:
                broken.append(str(error))
        return self.check(fault, not other and not broken, f"{other[:1]} {broken[:1]}")

    def ends_the_same(self, fault: str, folder: Path, *options: str) -> bool:
        """Resume the run to its end, and check that losses and weights match the reference."""
        code = self.wait(self.start(folder, *(options or self.newest(folder))))
        if not self.check(fault, code == 0, f"exit status {code}: {self.said(folder)}"):
            return False
        weights = load_checkpoint(folder / "last.ckpt")["state_dict"]
        same = all(torch.equal(weights[name], value) for name, value in self.weights.items())
        if self.check(fault, same, "other weights at the end") and self.same_so_far(fault, folder):
            self.count(fault, "resumed to the same bits")
            return True
        return False

    def refuses(self, fault: str, folder: Path, code: int, *words: str) -> bool:
        """Check that a run ended with a one-line error that contains these words."""
        said = self.said(folder)
        good = code in (1, 2) and said.startswith("hybridmem: ") and all(word in said for word in words)
        if self.check(fault, good, f"exit status {code}: {said}"):
            self.count(fault, "refused or stopped, naming the cause")
        return good


def settings(
    folder: Path,
    text: Path,
    steps: int,
    callbacks: list[dict[str, Any]],
    strategy: dict[str, Any] | None = None,
    accumulate: int = 1,
) -> dict[str, Any]:
    """Return a configuration with two layers, a checkpoint every second step, and validations of two batches.

    With gradient accumulation, validations fall within optimiser steps, and each keeps a checkpoint.
    """
    processes = 1 if strategy is None else 2
    regular = {"filename": "{step}", "save_last": True, "every_n_train_steps": 2}
    if accumulate > 1:
        monitored = {"filename": "within{step}", "monitor": "val/bits_per_byte", "auto_insert_metric_name": False}
        keepers = [regular, {**monitored, "save_top_k": -1}]
    else:
        keepers = [regular]
    checkpoints = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": k} for k in keepers]
    config = dict(
        variant="mag",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        attention_window=16,
        attention_dropout=0.1,
        memory_heads=2,
        memory_head_dim=16,
        memory_chunk_size=16,
    )
    return {
        "seed_everything": 0,
        "trainer": trainer_settings(folder, strategy)
        | {
            "max_steps": steps,
            "val_check_interval": 4,
            "limit_val_batches": 2,
            "gradient_clip_val": 1.0,
            "accumulate_grad_batches": accumulate,
            "callbacks": [*checkpoints, *callbacks],
        },
        "model": {
            "class_path": "hybridmem.training.PretrainModule",
            "init_args": {
                "config": config,
                "carry_state": True,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "lr_scheduler": {"class_path": "hybridmem.training.WarmupCosine", "init_args": {"warmup_steps": 2}},
            },
        },
        "data": {
            "class_path": "hybridmem.data.TextDataModule",
            "init_args": {
                "path": str(text),
                "pattern": "*.txt",
                "sequence_length": 64,
                "batch_size": 2 // processes,
                "val_fraction": 0.2,
                "mode": "continuous",
            },
        },
    }


def trainer_settings(folder: Path, strategy: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings of every run's trainer."""
    return {
        "accelerator": "cpu",
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "default_root_dir": str(folder),
        "logger": False,
        "devices": 1 if strategy is None else 2,
        "strategy": strategy or "auto",
    }


def waiting_settings(
    folder: Path, policy: Path, callbacks: list[dict[str, Any]], strategy: dict[str, Any] | None
) -> dict[str, Any]:
    """Return a configuration of DAPO in which most rollouts leave groups waiting, with a checkpoint per validation."""
    processes = 1 if strategy is None else 2
    keeper = {
        "filename": "within{step}",
        "monitor": "val/reward",
        "auto_insert_metric_name": False,
        "save_top_k": -1,
        "save_last": True,
    }
    return {
        "seed_everything": 0,
        "trainer": trainer_settings(folder, strategy)
        | {
            "max_steps": WAITING_STEPS,
            "val_check_interval": 3,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keeper},
                *callbacks,
            ],
        },
        "model": {
            "class_path": "hybridmem.training.PolicyModule",
            "init_args": {
                "model": str(policy),
                "objectives": [{"class_path": "hybridmem.rl.DAPO"}],
                "num_generations": 2,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "lr_scheduler": {"class_path": "hybridmem.training.WarmupCosine", "init_args": {"warmup_steps": 2}},
            },
        },
        "data": {
            "class_path": "hybridmem.data.TaskDataModule",
            "init_args": {"task": f"{__name__}.Rare", "mode": "prompts", "batch_size": 4 // processes, "num_val": 2},
        },
    }


def write_policy(folder: Path) -> None:
    """Write a tiny policy with random weights, large enough for various responses."""
    torch.manual_seed(0)
    config = HybridMemConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        attention_window=8,
        memory_heads=2,
        memory_head_dim=8,
        memory_chunk_size=8,
        initializer_range=0.3,
    )
    HybridMemForCausalLM(config).save_pretrained(folder)


def kill(drill: Drill, kills: int, fault: str = "SIGKILL") -> None:
    """Send SIGKILL at random moments, and every second time while a checkpoint is being written."""
    done, run = 0, 0
    while done < kills:
        folder, here = drill.folder("killed"), 0
        run += 1
        while done < kills and here < STARTS_BY_KILLS:
            process = drill.start(folder, *drill.newest(folder))
            if done % 2:
                await_writing(folder, process, drill)
            else:
                time.sleep(drill.random.uniform(0, drill.seconds))
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                break  # the run had finished
            here, done = here + 1, done + 1
            drill.count(fault, "kills")
            drill.count(fault, "kills while a checkpoint was written" if (folder / PART).exists() else "other kills")
            if not drill.same_so_far(fault, folder):
                return
        drill.ends_the_same(fault, folder)


def await_writing(folder: Path, process: int, drill: Drill) -> None:
    """Wait until one of the next few checkpoints is being written."""
    for _ in range(drill.random.randint(1, 4)):
        written = [path.stat().st_mtime_ns for path in folder.glob("last.ckpt")]
        while not (folder / PART).exists() or written != [path.stat().st_mtime_ns for path in folder.glob("last.ckpt")]:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            written = [path.stat().st_mtime_ns for path in folder.glob("last.ckpt")]
            time.sleep(0.0003)
        time.sleep(drill.random.uniform(0, 0.003))


def terminate(drill: Drill, times: int, fault: str = "SIGTERM") -> None:
    """Send SIGTERM at random moments, like a scheduler, and every third time SIGKILL shortly afterwards."""
    for turn in range(times):
        folder = drill.folder("terminated")
        process = drill.start(folder)
        time.sleep(drill.random.uniform(0.2, 1) * drill.seconds)
        os.kill(process, signal.SIGTERM)
        if turn % 3 == 2:
            time.sleep(drill.random.uniform(0, 0.05))
            for started in (process, *drill.others):
                os.kill(started, signal.SIGKILL)
        code = drill.wait(process)
        expected = (0, 130, -signal.SIGTERM, -signal.SIGKILL)
        if drill.check(fault, code in expected, f"exit status {code}: {drill.said(folder)}"):
            drill.count(fault, "saved and stopped" if code == 130 else "ended before, or at once")
            if code == 0:
                drill.same_so_far(fault, folder)
            else:
                drill.ends_the_same(fault, folder)


def stop_within_steps(drill: Drill, times: int, seed: int, batches: int) -> None:
    """Stop and resume in the middle of an optimiser step, with accumulated gradients, in one process and in two."""
    for name, strategy in {"one process": None, **SEVERAL}.items():
        accumulating = Drill(drill.work / f"accumulating, {name}", seed, batches, strategy, ACCUMULATED)
        accumulating.counts, accumulating.failures = drill.counts, drill.failures
        resume_within_steps(accumulating, times, f"resumed amid an accumulation, {name}")
        terminate(accumulating, times, f"SIGTERM while accumulating, {name}")
    accumulating = Drill(drill.work / "accumulating, exceptions", seed, batches, accumulate=ACCUMULATED)
    accumulating.counts, accumulating.failures = drill.counts, drill.failures
    raise_within_steps(accumulating, times)


def resume_within_steps(drill: Drill, times: int, fault: str) -> None:
    """Resume from checkpoints that validations wrote in the middle of an accumulation."""
    paths = sorted((drill.work / "reference").glob("within*.ckpt"))
    within = [path for path in paths if load_checkpoint(path, weights=False)["accumulation"]]
    for path in drill.random.sample(within, min(times, len(within))):
        drill.ends_the_same(fault, drill.folder("within"), "--ckpt_path", str(path))


def stop_while_groups_wait(drill: Drill, times: int, seed: int) -> None:
    """Kill and resume dynamic sampling while groups wait for a full batch, in one process and in two."""
    for name, strategy in {"one process": None, **SEVERAL}.items():
        waiting = Drill(drill.work / f"waiting, {name}", seed, WAITING_STEPS, strategy, waiting=True)
        waiting.counts, waiting.failures = drill.counts, drill.failures
        resume_with_waiting_groups(waiting, times, f"resumed with waiting groups, {name}")
        terminate(waiting, times, f"SIGTERM while groups wait, {name}")
        if strategy is None:
            kill(waiting, times, "SIGKILL while groups wait")


def resume_with_waiting_groups(drill: Drill, times: int, fault: str) -> None:
    """Resume from checkpoints of validations that hold groups of responses."""
    paths = sorted((drill.work / "reference").glob("within*.ckpt"))
    waiting = [path for path in paths if load_checkpoint(path, weights=False)["rollouts"]["waiting"]]
    if drill.check(fault, bool(waiting), f"no group waits in any of {len(paths)} checkpoints"):
        for path in drill.random.sample(waiting, min(times, len(waiting))):
            drill.ends_the_same(fault, drill.folder("waiting"), "--ckpt_path", str(path))


def raise_within_steps(drill: Drill, times: int) -> None:
    """Resume from an exception's checkpoint, or check that it is rejected if a backward pass was interrupted."""
    fault = "exception while accumulating"
    for turn in range(times):
        folder, batch = drill.folder("exception"), drill.random.randrange(2, drill.steps * ACCUMULATED)
        broken = {"class_path": f"{__name__}.BrokenBatch", "init_args": {"batch": batch, "backward": bool(turn % 2)}}
        keeper = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"filename": "failed", "save_on_exception": True, "every_n_train_steps": 1000},
        }
        drill.wait(drill.start(folder, callbacks=(broken, keeper)))
        if turn % 2 and batch % ACCUMULATED:
            code = drill.wait(drill.start(folder, "--ckpt_path", str(folder / "failed.ckpt")))
            drill.refuses(fault, folder, code, "interrupted the backward pass", "resume from another checkpoint")
        else:
            drill.ends_the_same(fault, folder, "--ckpt_path", str(folder / "failed.ckpt"))


def drop_each(drill: Drill, times: int, seed: int, batches: int) -> None:
    """Kill one of two processes, under each strategy."""
    for name, strategy in SEVERAL.items():
        several = Drill(drill.work / name, seed, batches, strategy)
        several.counts, several.failures = drill.counts, drill.failures
        drop(several, name, times)


def drop(drill: Drill, name: str, times: int) -> None:
    """Send SIGKILL to one of two processes at random moments, and every second time while a checkpoint is written."""
    fault = f"a process of two killed, {name}"
    for turn in range(times):
        folder = drill.folder("dropped")
        first = drill.start(folder)
        while not (folder / "last.ckpt").exists():
            time.sleep(0.01)
        if turn % 2:
            await_writing(folder, first, drill)
        else:
            time.sleep(drill.random.uniform(0, 0.5) * drill.seconds)
        os.kill(drill.others[0], signal.SIGKILL)
        code = drill.wait(first)
        if code == 0:
            drill.count(fault, "had come to its end")
            drill.same_so_far(fault, folder)
        elif drill.refuses(fault, folder, code, "another process of this run is gone", "--ckpt_path"):
            drill.ends_the_same(fault, folder)


def fill(drill: Drill, times: int) -> None:
    """Simulate a disk that fills up in the middle of a checkpoint, by limiting the size of files."""
    size = (drill.work / "reference" / "last.ckpt").stat().st_size
    for _ in range(times):
        folder, step = drill.folder("full"), drill.random.randrange(4, drill.steps - 2)
        limit = {"step": step, "size": drill.random.randrange(size)}
        callback = {"class_path": f"{__name__}.FullDisk", "init_args": limit}
        code = drill.wait(drill.start(folder, callbacks=(callback,)))
        if drill.refuses(
            "full disk", folder, code, "cannot write the checkpoint", f"the disk of {folder}", "--ckpt_path"
        ):
            drill.ends_the_same("full disk", folder, "--ckpt_path", advised(drill.said(folder)))


def fill_tmpfs(drill: Drill) -> None:
    """Fill a real disk, a tmpfs, if this user is allowed to mount one."""
    size = (drill.work / "reference" / "last.ckpt").stat().st_size
    folder = drill.folder("tmpfs")
    room = int(3.6 * size)  # room for three checkpoints, but not for the fourth, temporary one
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], capture_output=True).returncode:
        drill.count("full tmpfs", "skipped: mounting is not allowed")
        return
    try:
        code = drill.wait(drill.start(folder))
        if drill.refuses("full tmpfs", folder, code, "No space left", f"the disk of {folder}", "--ckpt_path"):
            subprocess.run(["mount", "-o", f"remount,size={10 * size}", folder], check=True)
            drill.ends_the_same("full tmpfs", folder, "--ckpt_path", advised(drill.said(folder)))
    finally:
        subprocess.run(["umount", folder], check=True)


def damage(drill: Drill, starts: int, reads: int) -> None:
    """Damage checkpoints, and check that reading them fails or returns the original contents."""
    whole = (drill.work / "reference" / "last.ckpt").read_bytes()
    expected = read_checkpoint(drill.work / "reference" / "last.ckpt")
    folder = drill.folder("damaged")
    for turn in range(reads):
        (folder / "last.ckpt").write_bytes(damaged(whole, drill.random, turn))
        try:
            same = equal(read_checkpoint(folder / "last.ckpt"), expected)
            if drill.check("damaged checkpoint, read", same, "a damaged checkpoint was taken"):
                drill.count("damaged checkpoint, read", "taken: the damage was in bytes that mean nothing")
        except ValueError as error:
            named = str(folder / "last.ckpt") in str(error)
            if drill.check("damaged checkpoint, read", named, str(error)):
                drill.count("damaged checkpoint, read", "refused")
    for turn in range(starts):
        folder = drill.folder("damaged")
        process = drill.start(folder)
        while len(list(folder.glob("previous.ckpt"))) < 1:
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        last, data = folder / "last.ckpt", (folder / "last.ckpt").read_bytes()
        # Flip a bit in the weights or truncate the file; other bytes may be meaningless.
        harm = flipped(data, len(data) // 2) if turn % 2 else data[: drill.random.randrange(len(data))]
        last.write_bytes(harm)
        code = drill.wait(drill.start(folder, "--ckpt_path", str(last)))
        good = newest_good(folder)
        words = (str(last), "cannot be read", f"--ckpt_path {good}")
        if drill.refuses("damaged checkpoint, start", folder, code, *words):
            last.unlink()
            drill.ends_the_same("damaged checkpoint, start", folder, "--ckpt_path", str(good))


def flipped(data: bytes, place: int) -> bytes:
    """Return data with one bit flipped."""
    return data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]


def damaged(data: bytes, numbers: random.Random, turn: int) -> bytes:
    """Return data with a flipped bit, a missing end or a block of zeros, and often a damaged archive directory."""
    place = numbers.randrange(len(data))
    if turn % 4 == 0:
        return flipped(data, place)
    if turn % 4 == 1:
        return flipped(data, len(data) - 1 - place % 5000)
    if turn % 4 == 2:
        return data[:place]
    return data[:place] + bytes(min(4096, len(data) - place)) + data[place + 4096 :]


def equal(a: Any, b: Any) -> bool:
    """Return True if two checkpoints have equal contents."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def spoil_batches(drill: Drill, times: int) -> None:
    """Inject a batch of NaN, and check that the guard stops before the weights change, or skips the step."""
    for turn in range(times):
        folder, step = drill.folder("nan"), drill.random.randrange(3, drill.steps - 1)
        nan = {"class_path": f"{__name__}.NoNumbers", "init_args": {"step": step}}
        if turn % 2 == 0:
            code = drill.wait(drill.start(folder, callbacks=(nan,)))
            words = ("output of model.layers.0", f"optimiser step {step}", "--ckpt_path")
            if drill.refuses("NaN batch, stop", folder, code, *words):
                drill.ends_the_same("NaN batch, stop", folder, "--ckpt_path", advised(drill.said(folder)))
            continue
        guard = {"class_path": "hybridmem.training.NonFiniteGuard", "init_args": {"action": "skip"}}
        code = drill.wait(drill.start(folder, callbacks=(nan, guard)))
        if drill.check("NaN batch, skip", code == 0, f"exit status {code}: {drill.said(folder)}"):
            saved = read_checkpoint(folder / "last.ckpt")
            finite = all(torch.isfinite(value).all() for value in saved["state_dict"].values())
            counted = [state["skipped"] for name, state in saved["callbacks"].items() if "NonFiniteGuard" in name]
            if drill.check("NaN batch, skip", finite and counted == [1], f"{finite=}, {counted=}"):
                drill.count("NaN batch, skip", "skipped, counted, trained to the end")


def corrupt_data(drill: Drill, times: int) -> None:
    """Change, truncate or remove data files between two starts, and check that resuming is rejected."""
    for turn in range(times):
        folder = drill.folder("data")
        process = drill.start(folder)
        while not (folder / "last.ckpt").exists():
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        files = sorted(drill.text.iterdir())
        file = drill.random.choice(files)
        data = file.read_bytes()
        if turn % 3 == 0:
            file.write_bytes(flipped(data, drill.random.randrange(len(data))))
        elif turn % 3 == 1:
            file.write_bytes(data[: len(data) // 2])
        else:
            file.unlink()
        code = drill.wait(drill.start(folder, *drill.newest(folder)))
        trained_on = code != 0  # validation files may change without changing the losses
        if trained_on:
            drill.refuses("corrupted data", folder, code, "training rows", str(drill.text))
        else:
            drill.same_so_far("corrupted data", folder)
            drill.count("corrupted data", "a file of the validation set: the same losses")
        drill.write_text()
        if trained_on:
            drill.ends_the_same("corrupted data", folder)


def advised(line: str) -> str:
    """Return the checkpoint that an error message recommends."""
    return line.split("--ckpt_path ")[-1].split(",")[0].strip()


def main() -> None:
    """Run the drill, and exit with 1 on any failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=FAULTS, help="faults to inject (default: all)")
    parser.add_argument("--kills", type=int, default=50, help="number of SIGKILLs")
    parser.add_argument("--times", type=int, default=12, help="repetitions of every other fault")
    parser.add_argument("--reads", type=int, default=2000, help="number of damaged checkpoints to read")
    parser.add_argument("--batches", type=int, default=40, help="batches of every run (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random faults")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    begun = time.monotonic()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        drill = Drill(Path(folder), options.seed, options.batches)
        drills: dict[str, Callable[[], Any]] = {
            "kill": lambda: kill(drill, options.kills),
            "drop": lambda: drop_each(drill, options.times, options.seed, options.batches),
            "terminate": lambda: terminate(drill, options.times),
            "within": lambda: stop_within_steps(drill, options.times, options.seed, options.batches),
            "wait": lambda: stop_while_groups_wait(drill, options.times, options.seed),
            "fill": lambda: fill(drill, options.times),
            "tmpfs": lambda: fill_tmpfs(drill),
            "damage": lambda: damage(drill, options.times, options.reads),
            "spoil": lambda: spoil_batches(drill, options.times),
            "corrupt": lambda: corrupt_data(drill, options.times),
        }
        for fault in options.faults:
            drills[fault]()
    for fault, counts in drill.counts.items():
        print(f"{fault:30}", ", ".join(f"{count} {what}" for what, count in counts.items()))
    print(f"{time.monotonic() - begun:.0f} seconds; {len(drill.failures)} failures", *drill.failures, sep="\n")
    if options.output:
        figures = {"command": " ".join(["python", *sys.argv]), "faults": drill.counts, "failures": drill.failures}
        options.output.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(bool(drill.failures))


if __name__ == "__main__":
    main()
