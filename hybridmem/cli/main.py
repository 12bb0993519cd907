"""Command line with Lightning's subcommands and hybridmem's own."""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import auto_cli
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info

from hybridmem.checks import at_least
from hybridmem.distributed import lost_a_process
from hybridmem.training.allocator import keep_freed_memory
from hybridmem.training.callbacks.lifecycle import FinalCheckpoint, GracefulStop, RandomState
from hybridmem.training.callbacks.non_finite_guard import NonFiniteGuard
from hybridmem.training.checkpoints.contents import check_same_model
from hybridmem.training.checkpoints.durable import DurableCheckpointIO
from hybridmem.training.checkpoints.loading import load_checkpoint
from hybridmem.training.checkpoints.sharded import DurableModelParallelStrategy, is_sharded
from hybridmem.training.checkpoints.starting_points import check_starting_points
from hybridmem.training.denormals import flush_denormals
from hybridmem.training.errors import SettingsError, named
from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.precision import choose_precision, precision_advice
from hybridmem.training.pretrain import PretrainModule
from hybridmem.training.retrofit import RetrofitModule
from hybridmem.training.run_lock import RUN_LOCK, LockedError, hold
from hybridmem.training.trackers import check_packages

from .compare import compare
from .console import hide_useless_lines, one_line_exits
from .consolidate import consolidate
from .convert import convert
from .eval import evaluate
from .export import export
from .generate import generate
from .parsing import CommandParser, TrainingParser, one_line, refuse_null_arguments, refuse_nulls, settings_errors
from .progress import with_bar
from .report import report
from .show import show
from .subnetwork import subnetwork

Trained = PretrainModule | PolicyModule | RetrofitModule
COMMANDS = {
    "convert": convert,
    "export": export,
    "consolidate": consolidate,
    "generate": generate,
    "eval": evaluate,
    "show": show,
    "subnetwork": subnetwork,
    "compare": compare,
    "report": report,
}
# Folders that a command accepts as positional arguments, in this order.
FOLDERS = {"subnetwork": ("before", "after", "other"), "report": ("run_dir", "other")}
STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy, DurableModelParallelStrategy)
LIMIT = re.compile("limit_(train|val)_batches")
LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
# Settings that the trainer's barebones mode disables. Lightning itself only reports the first one.
NOT_BAREBONES = (
    "enable_checkpointing",
    "logger",
    "enable_progress_bar",
    "log_every_n_steps",
    "enable_model_summary",
    "num_sanity_val_steps",
    "fast_dev_run",
    "detect_anomaly",
    "profiler",
)
EXAMPLES = {"model": "training.PretrainModule", "data": "data.TextDataModule"}
TRAINING_COMMANDS = ("fit", "validate", "test", "predict")
USAGE = """usage: hybridmem COMMAND [--config FILE] [options]

  convert      convert a pretrained transformers model to a HybridMem folder with the same logits
  fit          train a model: pretraining, reinforcement learning, distillation or a retrofit
  validate     compute a checkpoint's held-out metrics
  test         compute a checkpoint's loss by position and needle accuracy
  predict      write the bits that each held-out token costs
  export       export a checkpoint as a Hugging Face folder
  consolidate  merge a sharded run's checkpoint into one file, for any strategy
  generate     generate text with an exported model
  eval         evaluate a causal LM on long contexts: table, heat map, JSON
  show         write a page with the tokens that a model reads, by layer and head
  subnetwork   compare the weights of two or three exported models
  compare      run a grid of architectures and controls, from warm-ups to a report
  report       rewrite a grid's report, or compare two grids

hybridmem COMMAND --help lists a command's options. --print_config prints a complete configuration.
"""


class ProcessLost(Exception):
    """A failure caused by another process of the run that is gone."""


class HybridMemCLI(LightningCLI):
    """LightningCLI with checks of settings, data and checkpoint before any work."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return only the given command, because building the parsers of all four takes longer than reading a file."""
        every = LightningCLI.subcommands()
        given = {name: skipped for name, skipped in every.items() if name in sys.argv[1:2]}
        return given or every

    def _add_instantiators(self) -> None:
        """Disable Lightning's saving of arguments, which would give a mixture's arguments to each of its parts."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read the configuration."""
        with settings_errors():
            super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer from the configuration."""
        with settings_errors():
            trainer = self._get(self.config, "trainer")
            if isinstance(trainer, int | float | str | list):
                raise ValueError(f"trainer={trainer!r} must hold settings by name")
            refuse_null_arguments(trainer, L.Trainer, "trainer")
            for name in ("max_time", "val_check_interval"):
                if isinstance(trainer[name], str | dict):  # a duration
                    with named(f"trainer.{name}"):
                        Timer(trainer[name])
            settings = self.config[self.config.subcommand]
            refuse_nulls(settings)
            check_packages(trainer["logger"])
            if not settings.get("ckpt_path"):  # whose run started from them
                root, files = trainer["default_root_dir"] or ".", map(str, settings["config"] or [])
                check_starting_points(settings.get("model"), settings.get("data"), root, [*files])
            super().instantiate_classes()

    def instantiate_trainer(self, **settings: Any) -> L.Trainer:
        """Build the trainer, with logs and checkpoints below default_root_dir unless configured otherwise."""
        root = Path(self._get(self.config_init, "trainer.default_root_dir") or ".")
        barebones = self._get(self.config_init, "trainer.barebones")
        if barebones:
            check_barebones(self._get(self.config_init, "trainer"))
        else:
            settings["logger"] = self._loggers(root)
        given = self._get(self.config_init, "trainer")
        if given["enable_progress_bar"] is not False and not barebones:
            settings["callbacks"] = with_bar(given["callbacks"])
        precision = choose_precision(given, type(self.model))
        if precision is not None:
            settings["precision"] = precision
        trainer = super().instantiate_trainer(**settings)
        line = precision_advice(given, precision)
        if line is not None and self.subcommand == "fit":
            rank_zero_info(line)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(root)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's default
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        if type(trainer.strategy) is ModelParallelStrategy:  # the name that configurations use
            trainer.strategy.__class__ = DurableModelParallelStrategy
        if not any(isinstance(callback, NonFiniteGuard) for callback in trainer.callbacks):
            trainer.callbacks.insert(0, NonFiniteGuard())
        trainer.callbacks.insert(0, FinalCheckpoint())  # before WeightAveraging swaps the weights at the end
        return trainer

    def _loggers(self, root: Path) -> Any:
        """Return TensorBoard and CSV files, or the configured trackers with CSV files, which `compare` reads."""
        given = self._get(self.config_init, "trainer.logger")
        if given in (None, True):
            return [TensorBoardLogger(root, name="tensorboard"), CSVLogger(root, name="csv")]
        loggers = [] if given is False else given if isinstance(given, list) else [given]
        if not loggers or any(isinstance(logger, CSVLogger) for logger in loggers):
            return given
        return [*loggers, CSVLogger(root, name="csv")]

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise SettingsError(f"seed_everything: {error}") from error

    def after_fit(self) -> None:
        """Name the last checkpoint, and the command that exports it."""
        written = [
            callback.last_model_path or callback._last_checkpoint_saved
            for callback in self.trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint)
        ]
        path = next(filter(None, written), None)
        if path is not None and isinstance(self.model, Trained) and self.trainer.is_global_zero:
            command = shlex.join(["hybridmem", "export", "--ckpt_path", path, "--output", "my_model"])
            print(f"wrote {path}; next: {command}")

    def predict(self, **arguments: Any) -> None:
        """Predict, and write one line of JSON per row."""
        batches = self.trainer.predict(**arguments)
        path = Path(self.trainer.default_root_dir) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for batch in batches for row in batch))
        print(f"wrote {path}")

    def _parse_ckpt_path(self) -> None:
        """Ignore a checkpoint's settings; the configuration has them, and `_check` compares the two."""

    def _run_subcommand(self, subcommand: str) -> None:
        with ExitStack() as stack:
            with settings_errors():
                root = Path(self.trainer.default_root_dir)
                make_writable(root)
                if subcommand == "fit" and self.trainer.is_global_zero:  # its lock covers the run's other processes
                    stack.enter_context(held_folder(root))
                self._check(subcommand)
            self._run_checked(subcommand)

    def _run_checked(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if isinstance(self.model, Trained) and subcommand == "fit" and not self.model.has_started:
                with settings_errors():  # the trainer builds optimiser, schedule and strategy before the first batch
                    if self.trainer.overfit_batches and LIMIT.search(str(error)):  # it overrides both limits
                        raise ValueError(LIMIT.sub("overfit_batches", str(error))) from error
                    raise error
            if lost_a_process(error):
                raise ProcessLost(self._how_to_go_on(error)) from error
            raise

    def _how_to_go_on(self, error: Exception) -> str:
        """Describe the loss of another process, and the checkpoint to resume from."""
        root = Path(self.trainer.default_root_dir)
        saved = [path for path in root.glob("*.ckpt") if path.is_file() or is_sharded(path)]
        last = max(saved, key=lambda path: path.stat().st_mtime, default=None)
        remedy = "start again (no checkpoint was written yet)" if last is None else f"resume with --ckpt_path {last}"
        return f"another process of this run is gone or hangs ({one_line(str(error))[:200]}); {remedy}"

    def _check(self, subcommand: str) -> None:
        """Check settings, data and checkpoint early, before any long computation."""
        path = self._get(self.config, "ckpt_path")
        self._check_strategy(path)
        at_least(1, **{"trainer.check_val_every_n_epoch": self._get(self.config, "trainer.check_val_every_n_epoch")})
        limits = {f"trainer.{name}": getattr(self.trainer, name) for name in LIMITS}
        at_least(0, **{name: value for name, value in limits.items() if isinstance(value, int)})
        for name, part in (("model", self.model), ("data", self.datamodule)):
            if type(part) in (L.LightningModule, L.LightningDataModule):
                raise ValueError(
                    f"{name} has no class; set {name}.class_path, for example to hybridmem.{EXAMPLES[name]}"
                )
        if subcommand == "fit" and not path:
            self._check_fresh(Path(self.trainer.default_root_dir))
        self.datamodule.setup({"validate": "validate", "predict": "validate"}.get(subcommand, subcommand))
        if not isinstance(self.model, Trained):
            return
        self.model.check_data(self.datamodule)
        if subcommand == "fit":
            self.model.check_schedule(self.trainer)
        elif not path and not isinstance(self.model, PolicyModule):  # PolicyModule loads the weights in `model`
            raise ValueError(f"hybridmem {subcommand} needs a checkpoint; give --ckpt_path, written by hybridmem fit")
        if subcommand == "test":
            self.datamodule.test_dataloader()  # raises an error if needles do not fit
        if path and path not in ("last", "best", "hpc", "registry"):
            rank, size = self.trainer.global_rank, self.trainer.world_size
            checkpoint = load_checkpoint(path, weights=False, rank=rank, size=size)
            if isinstance(self.model, PretrainModule | RetrofitModule):
                check_same_model(self.model.config, checkpoint)

    def _check_strategy(self, ckpt_path: Any) -> None:
        """Raise a ValueError if the strategy is unsupported, or cannot read the checkpoint."""
        strategy = self.trainer.strategy
        if type(strategy) not in STRATEGIES:
            raise ValueError(
                f"trainer.strategy: {type(strategy).__name__} is not supported; choose auto, ddp, or "
                "lightning.pytorch.strategies.ModelParallelStrategy (FSDP2)"
            )
        if ckpt_path and is_sharded(ckpt_path) and not isinstance(strategy, ModelParallelStrategy):
            raise ValueError(
                f"ckpt_path={ckpt_path} is a sharded checkpoint, which {type(strategy).__name__} cannot read; merge it "
                f"into one file first (hybridmem consolidate --ckpt_path {ckpt_path} --output whole.ckpt)"
            )

    def _check_fresh(self, root: Path) -> None:
        """Raise a ValueError if a new run would overwrite another run's checkpoints."""
        held = max(root.glob("*.ckpt"), key=lambda path: path.lstat().st_mtime_ns, default=None)
        if held is not None:
            raise ValueError(
                f"trainer.default_root_dir={root} holds {held.name} of an earlier run; resume it "
                f"(--ckpt_path {held}), choose another folder, or remove this one"
            )


def check_barebones(trainer: Mapping[str, Any]) -> None:
    """Check that no setting needs a feature that the trainer's barebones mode disables.

    Raises:
        ValueError: there are such settings; the message names all of them.
    """
    callbacks = trainer.get("callbacks") or []
    given = [f"{name}={trainer[name]!r}" for name in NOT_BAREBONES if trainer.get(name)]
    given += [
        type(callback).__name__ for callback in callbacks if isinstance(callback, Checkpoint | LearningRateMonitor)
    ]
    if given:
        raise ValueError(
            "trainer.barebones=true disables checkpoints, logs and checks, in order to time steps; remove "
            f"{', '.join(given)} from trainer, or set barebones to false"
        )


def make_writable(root: Path) -> None:
    """Create a run's folder.

    Raises:
        PermissionError: the folder is not writable.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK)
    except OSError:  # a file has that name, or the file system rejects the folder
        writable = False
    if not writable:
        raise PermissionError(f"trainer.default_root_dir={root} is not writable; choose another folder")


@contextmanager
def held_folder(root: Path) -> Iterator[None]:
    """Hold a folder for the duration of a context, so that no other run can train in it.

    Raises:
        ValueError: another run is training in the folder.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(root / RUN_LOCK))
        except LockedError as error:
            raise ValueError(
                f"trainer.default_root_dir={root} is in use by another run ({error.holder}); wait until it ends, stop "
                f"it (kill {error.holder.pid}), or choose another folder"
            ) from error
        yield


def named_folders(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments with option names inserted before positional folders.

    Raises:
        ValueError: there are more folders than the command accepts.
    """
    command, *rest = arguments
    if command not in FOLDERS:
        return [command, *rest]
    count = next((n for n, argument in enumerate(rest) if argument.startswith("-")), len(rest))
    names = FOLDERS[command]
    if count > len(names):
        raise ValueError(f"{command} takes at most {len(names)} folders, not {count}: {' '.join(rest[:count])}")
    named = [part for name, folder in zip(names, rest[:count], strict=False) for part in (f"--{name}", folder)]
    return [command, *named, *rest[count:]]


def main() -> None:
    """Run a command, and exit with 2 on errors in settings or with 1 if the run cannot continue."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    hide_useless_lines()
    keep_freed_memory()
    flush_denormals()
    with one_line_exits("hybridmem"):
        try:
            run(arguments)
        except ProcessLost as error:
            print(f"hybridmem: error: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # sys.exit would wait for the remaining processes of the group


def run(arguments: Sequence[str]) -> None:
    """Run a command."""
    if arguments[0] in COMMANDS:
        named_as = dict(prog=f"hybridmem {arguments[0]}", parser_class=CommandParser)
        with settings_errors():
            command, *options = named_folders(arguments)
            auto_cli(COMMANDS[command], args=options, as_positional=False, **named_as)
            sys.stdout.flush()
    elif not arguments[0].startswith("-") and arguments[0] not in TRAINING_COMMANDS:
        commands = ", ".join((*TRAINING_COMMANDS, *COMMANDS))
        raise SettingsError(f"unknown command {arguments[0]!r}; choose one of {commands}")
    else:
        HybridMemCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [RandomState(), GracefulStop()]},
            parser_kwargs={"description": "Train and evaluate hybrid models of neural memory and attention."},
            auto_configure_optimizers=False,
            parser_class=TrainingParser,
        )
