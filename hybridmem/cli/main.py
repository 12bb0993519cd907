"""The command line: Lightning's subcommands, and a few of our own in the same form."""

import json
import os
import re
import signal
import sys
import warnings
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

from hybridmem.checks import at_least
from hybridmem.distributed import lost_a_process
from hybridmem.training.allocator import keep_freed_memory
from hybridmem.training.callbacks.lifecycle import FinalCheckpoint, GracefulStop, RandomState
from hybridmem.training.callbacks.non_finite_guard import NonFiniteGuard
from hybridmem.training.checkpoints.contents import check_same_model
from hybridmem.training.checkpoints.durable import DurableCheckpointIO
from hybridmem.training.checkpoints.loading import load_checkpoint
from hybridmem.training.checkpoints.sharded import DurableModelParallelStrategy, is_sharded
from hybridmem.training.errors import SettingsError, StoppedError, named
from hybridmem.training.policy.module import PolicyModule
from hybridmem.training.pretrain import PretrainModule
from hybridmem.training.retrofit import RetrofitModule
from hybridmem.training.run_lock import RUN_LOCK, LockedError, hold

from .compare import compare
from .consolidate import consolidate
from .convert import convert
from .eval import evaluate
from .export import export
from .generate import generate
from .parsing import CommandParser, TrainingParser, one_line, refuse_null_arguments, refuse_nulls, settings_errors
from .report import report
from .subnetwork import subnetwork

Trained = PretrainModule | PolicyModule | RetrofitModule
COMMANDS = {
    "convert": convert,
    "export": export,
    "consolidate": consolidate,
    "generate": generate,
    "eval": evaluate,
    "subnetwork": subnetwork,
    "compare": compare,
    "report": report,
}
# The folders that a command takes without their names, in this order.
FOLDERS = {"subnetwork": ("before", "after", "other"), "report": ("run_dir", "other")}
STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy, DurableModelParallelStrategy)
LIMIT = re.compile("limit_(train|val)_batches")
LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
# Settings that are off in the trainer's barebones mode, which has an error for each alone.
NOT_BAREBONES = (
    "enable_checkpointing", "logger", "enable_progress_bar", "log_every_n_steps", "enable_model_summary",
    "num_sanity_val_steps", "fast_dev_run", "detect_anomaly", "profiler",
)  # fmt: skip
EXAMPLES = {"model": "training.PretrainModule", "data": "data.TextDataModule"}
INTERRUPTED = 128 + signal.SIGINT  # the exit status after a Ctrl-C
TRAINING_COMMANDS = ("fit", "validate", "test", "predict")
USAGE = """usage: hybridmem COMMAND [--config FILE] [options]

  convert    a pretrained model of transformers as a HybridMem folder with the same logits
  fit        train: pretraining, or whatever the configuration says
  validate   held-out loss of a checkpoint
  test       loss by position and needles of a checkpoint
  predict    bits that each held-out token takes
  export     a checkpoint as a Hugging Face folder
  consolidate
             a sharded run's checkpoint as one file, for any strategy
  generate   text from an exported folder
  eval       a causal LM on long contexts: table, heat map, JSON
  subnetwork which weights training changed, of two or three exported folders
  compare    a grid of architectures and controls, from warm-ups to a report
  report     a grid's report again, or two grids' beside each other

hybridmem COMMAND --help lists a command's options; --print_config prints the whole configuration.
"""


class ProcessLost(Exception):
    """Another process of the run is gone."""


class HybridMemCLI(LightningCLI):
    """LightningCLI that checks settings, data and checkpoint before it starts to work."""

    def _add_instantiators(self) -> None:
        """Let data modules save their own arguments: Lightning would give a mixture's to each of its parts."""

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
                if isinstance(trainer[name], str | dict):  # a length of time
                    with named(f"trainer.{name}"):
                        Timer(trainer[name])
            refuse_nulls(self.config[self.config.subcommand])
            super().instantiate_classes()

    def instantiate_trainer(self, **settings: Any) -> L.Trainer:
        """Build the trainer; what it writes goes below default_root_dir unless the configuration says otherwise."""
        root = Path(self._get(self.config_init, "trainer.default_root_dir") or ".")
        barebones = self._get(self.config_init, "trainer.barebones")
        if barebones:
            check_barebones(self._get(self.config_init, "trainer"))
        elif self._get(self.config_init, "trainer.logger") in (None, True):
            settings["logger"] = [TensorBoardLogger(root, name="tensorboard"), CSVLogger(root, name="csv")]
        trainer = super().instantiate_trainer(**settings)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(root)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the configuration names no other
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        if type(trainer.strategy) is ModelParallelStrategy:  # as configurations name it
            trainer.strategy.__class__ = DurableModelParallelStrategy
        if not any(isinstance(callback, NonFiniteGuard) for callback in trainer.callbacks):
            trainer.callbacks.insert(0, NonFiniteGuard())
        trainer.callbacks.insert(0, FinalCheckpoint())  # before WeightAveraging ends with averages for weights
        return trainer

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise SettingsError(f"seed_everything: {error}") from error

    def predict(self, **arguments: Any) -> None:
        """Predict, and write a line of JSON for every row."""
        batches = self.trainer.predict(**arguments)
        path = Path(self.trainer.default_root_dir) / "predictions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for batch in batches for row in batch))
        print(f"wrote {path}")

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint: the configuration says them, and `_check` compares."""

    def _run_subcommand(self, subcommand: str) -> None:
        with ExitStack() as stack:
            with settings_errors():
                root = Path(self.trainer.default_root_dir)
                make_writable(root)
                if subcommand == "fit" and self.trainer.is_global_zero:  # the others of its processes belong to it
                    stack.enter_context(held_folder(root))
                self._check(subcommand)
            self._run_checked(subcommand)

    def _run_checked(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except Exception as error:
            if isinstance(self.model, Trained) and subcommand == "fit" and not self.model.has_started:
                with settings_errors():  # optimiser, schedule, strategy: built by the trainer, before the first batch
                    if self.trainer.overfit_batches and LIMIT.search(str(error)):  # it stands for both, and was set
                        raise ValueError(LIMIT.sub("overfit_batches", str(error))) from error
                    raise error
            if lost_a_process(error):
                raise ProcessLost(self._how_to_go_on(error)) from error
            raise

    def _how_to_go_on(self, error: Exception) -> str:
        """What a process says that has lost another one."""
        root = Path(self.trainer.default_root_dir)
        saved = [path for path in root.glob("*.ckpt") if path.is_file() or is_sharded(path)]
        last = max(saved, key=lambda path: path.stat().st_mtime, default=None)
        remedy = "no checkpoint was written yet" if last is None else f"go on with --ckpt_path {last}"
        return f"another process of this run is gone or hangs ({one_line(str(error))[:200]}): {remedy}"

    def _check(self, subcommand: str) -> None:
        """Read the data and the checkpoint's description now: what is wrong with them should not wait."""
        path = self._get(self.config, "ckpt_path")
        self._check_strategy(path)
        at_least(1, **{"trainer.check_val_every_n_epoch": self._get(self.config, "trainer.check_val_every_n_epoch")})
        limits = {f"trainer.{name}": getattr(self.trainer, name) for name in LIMITS}
        at_least(0, **{name: value for name, value in limits.items() if isinstance(value, int)})
        for name, part in (("model", self.model), ("data", self.datamodule)):
            if type(part) in (L.LightningModule, L.LightningDataModule):
                raise ValueError(f"{name} names no class: set {name}.class_path, such as hybridmem.{EXAMPLES[name]}")
        if subcommand == "fit" and not path:
            self._check_fresh(Path(self.trainer.default_root_dir))
        self.datamodule.setup({"validate": "validate", "predict": "validate"}.get(subcommand, subcommand))
        if not isinstance(self.model, Trained):
            return
        self.model.check_data(self.datamodule)
        if subcommand == "fit":
            self.model.check_schedule(self.trainer)
        elif not path and not isinstance(self.model, PolicyModule):  # whose setting `model` names weights
            raise ValueError(f"hybridmem {subcommand} needs --ckpt_path, a checkpoint of hybridmem fit")
        if subcommand == "test":
            self.datamodule.test_dataloader()  # needles that do not fit are found now
        if path and path not in ("last", "best", "hpc", "registry"):
            rank, size = self.trainer.global_rank, self.trainer.world_size
            checkpoint = load_checkpoint(path, weights=False, rank=rank, size=size)
            if isinstance(self.model, PretrainModule | RetrofitModule):
                check_same_model(self.model.config, checkpoint)

    def _check_strategy(self, ckpt_path: Any) -> None:
        """Raise when the strategy is none that is tried, or cannot go on from the checkpoint."""
        strategy = self.trainer.strategy
        if type(strategy) not in STRATEGIES:
            raise ValueError(
                f"trainer.strategy: {type(strategy).__name__} is not supported: choose auto, ddp, or "
                "lightning.pytorch.strategies.ModelParallelStrategy (FSDP2)"
            )
        if ckpt_path and is_sharded(ckpt_path) and not isinstance(strategy, ModelParallelStrategy):
            raise ValueError(
                f"ckpt_path={ckpt_path} is of a sharded run, which {type(strategy).__name__} cannot read: make one "
                f"file of it first (hybridmem consolidate --ckpt_path {ckpt_path} --output whole.ckpt)"
            )

    def _check_fresh(self, root: Path) -> None:
        """Raise when a new run would write over another one's checkpoints."""
        held = max(root.glob("*.ckpt"), key=lambda path: path.lstat().st_mtime_ns, default=None)
        if held is not None:
            raise ValueError(
                f"trainer.default_root_dir={root} holds {held.name} of an earlier run: go on with it "
                f"(--ckpt_path {held}), choose another folder, or remove this one"
            )


def check_barebones(trainer: Mapping[str, Any]) -> None:
    """Check that nothing is switched on that the trainer's barebones mode leaves out.

    Raises:
        ValueError: naming all such settings.
    """
    callbacks = trainer.get("callbacks") or []
    given = [f"{name}={trainer[name]!r}" for name in NOT_BAREBONES if trainer.get(name)]
    given += [
        type(callback).__name__ for callback in callbacks if isinstance(callback, Checkpoint | LearningRateMonitor)
    ]
    if given:
        raise ValueError(
            "trainer.barebones=true trains without checkpoints, logs and checks, to time steps alone: remove "
            f"{', '.join(given)} from trainer, or set barebones to false"
        )


def make_writable(root: Path) -> None:
    """Make a run's folder.

    Raises:
        PermissionError: the run cannot write there.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        writable = os.access(root, os.W_OK)
    except OSError:  # a file of that name, or a file system that takes no folders
        writable = False
    if not writable:
        raise PermissionError(f"trainer.default_root_dir={root} cannot be written to: choose another folder")


@contextmanager
def held_folder(root: Path) -> Iterator[None]:
    """A context in which no other run can train in this folder.

    Raises:
        ValueError: another run does.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(root / RUN_LOCK))
        except LockedError as error:
            raise ValueError(
                f"trainer.default_root_dir={root} is in use by another run ({error.holder}): wait for its end, stop "
                f"it (kill {error.holder.pid}), or choose another folder"
            ) from error
        yield


def named_folders(arguments: Sequence[str]) -> list[str]:
    """A command's arguments with the names of the folders that stand first without one.

    Raises:
        ValueError: more folders than the command takes.
    """
    command, *rest = arguments
    if command not in FOLDERS:
        return [command, *rest]
    count = next((n for n, argument in enumerate(rest) if argument.startswith("-")), len(rest))
    names = FOLDERS[command]
    if count > len(names):
        raise ValueError(f"{command} takes {len(names)} folders at most, not {count}: {' '.join(rest[:count])}")
    named = [part for name, folder in zip(names, rest[:count], strict=False) for part in (f"--{name}", folder)]
    return [command, *named, *rest[count:]]


def main() -> None:
    """Run a command; exits with 2 and one line where the settings are at fault, with 1 where the run cannot go on."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    # Lightning asks torch a question in a way that torch deprecates; users cannot do anything about it.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    # PolicyModule keeps its model in evaluation mode, which has no dropout, on purpose.
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    keep_freed_memory()
    try:
        if arguments[0] in COMMANDS:
            with settings_errors():
                auto_cli(COMMANDS, args=named_folders(arguments), as_positional=False, parser_class=CommandParser)
                sys.stdout.flush()
        elif not arguments[0].startswith("-") and arguments[0] not in TRAINING_COMMANDS:
            commands = ", ".join((*TRAINING_COMMANDS, *COMMANDS))
            raise SettingsError(f"there is no command {arguments[0]!r}; choose one of {commands}")
        else:
            HybridMemCLI(
                L.LightningModule,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"callbacks": [RandomState(), GracefulStop()]},
                parser_kwargs={"description": "Train and evaluate hybrids of neural memory and attention."},
                auto_configure_optimizers=False,
                parser_class=TrainingParser,
            )
    except SettingsError as error:
        print(f"hybridmem: error: {error}", file=sys.stderr)
        sys.exit(2)
    except StoppedError as error:
        print(f"hybridmem: stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except ProcessLost as error:
        print(f"hybridmem: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # not sys.exit: what is left of the group would be waited for
    except BrokenPipeError:  # as in `hybridmem … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("hybridmem: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as exit:
        # Lightning makes a plain 1 of a Ctrl-C, as if something had gone wrong.
        sys.exit(INTERRUPTED if isinstance(exit.__context__, KeyboardInterrupt) else exit.code)
