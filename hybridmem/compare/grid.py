"""What a comparison runs: tasks × architectures × controls × targets × seeds."""

import json
from collections import UserDict, UserList
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import register_type

from hybridmem.model.configuration import MEMORY_VARIANTS, VARIANTS
from hybridmem.rl.attention.targets import TARGETS


class FitOptions(UserDict[str, Any]):
    """Options of `hybridmem fit` as they stand in the configuration: classes are named, not made."""


class Objectives(UserList[dict[str, Any]]):
    """Objectives as `hybridmem fit` takes them: class_path and init_args."""


# The parser would make an object of everything that has a class_path, were these plain dicts and lists.
register_type(FitOptions, serializer=dict, deserializer=FitOptions)
register_type(Objectives, serializer=list, deserializer=Objectives)

SUPERVISED = Objectives([{"class_path": "hybridmem.rl.SFT"}])
TOKEN = Objectives([{"class_path": "hybridmem.rl.DrGRPO"}])
ATTENTION = Objectives([{"class_path": "hybridmem.rl.AttentionRL", "init_args": {"weight": 1.0}}])
CONTROLS = {
    "supervised": SUPERVISED,
    "token": TOKEN,
    "attention": ATTENTION,
    "token + attention": Objectives(TOKEN + ATTENTION),
}
CALLBACKS = "trainer.callbacks+"  # a list, added to those of the configuration
MASK = "mask.safetensors"  # which weights a cell changed, in its folder
START = "start"  # the warm-up as the cells' own validation sees it
ACCURACY = "val/accuracy"


@dataclass
class Comparison:
    """One task's part of the grid. Every cell goes on from its architecture's and seed's warm-up.

    Args:
        warm_up: configuration of `hybridmem fit` that makes the supervised start.
        train: configuration of `hybridmem fit` with a PolicyModule; the cells change its objectives alone.
        architectures: by name, what they change in the warm-up's model.init_args.config.
        controls: by name, objectives as `hybridmem fit` takes them.
        targets: what AttentionRL shapes, where a control has it and the architecture has such a distribution.
        masked: controls, with their targets as the report names them, that run once more from the same start, training
            only the weights that they changed before.
        seeds: of weights, data order and rollouts.
        metric: what the cells log at validation and the report compares, a share, higher is better.
        warm_up_options: further dotted options of `hybridmem fit` for the warm-ups.
        train_options: the same for the cells.
        options: the same for both, such as the task's settings.
        init_from: another task of the grid, an easier one: each warm-up begins with the weights of that task's warm-up
            of the same architecture and seed.
    """

    warm_up: Path
    train: Path
    architectures: dict[str, FitOptions] = field(
        default_factory=lambda: {name: FitOptions(variant=name) for name in ("swa", "mag", "mac", "full")}
    )
    controls: dict[str, Objectives] = field(default_factory=lambda: dict(CONTROLS))
    targets: list[str] = field(default_factory=lambda: ["attention"])
    masked: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    metric: str = ACCURACY
    warm_up_options: FitOptions = field(default_factory=FitOptions)
    train_options: FitOptions = field(default_factory=FitOptions)
    options: FitOptions = field(default_factory=FitOptions)
    init_from: str | None = None

    @property
    def controls_and_start(self) -> dict[str, Objectives]:
        """The controls, and the start, which only validates: its objectives are not used."""
        return {START: SUPERVISED, **self.controls}


@dataclass(frozen=True)
class Run:
    """One run of `hybridmem`: a warm-up, its evaluation, or a cell of the grid."""

    task: str
    architecture: str
    seed: int
    control: str = ""  # of a cell; a warm-up has none
    target: str = ""  # of AttentionRL, where the control has it
    masked: bool = False  # whether only the weights are trained that the same run without a mask changed
    init_from: str | None = None  # the task whose warm-up its warm-up begins with

    @property
    def is_warm_up(self) -> bool:
        """Whether this is a supervised start rather than a cell."""
        return not self.control

    @property
    def warm_up(self) -> "Run":
        """The supervised start that a cell goes on from."""
        return Run(self.task, self.architecture, self.seed, init_from=self.init_from)

    @property
    def after(self) -> "Run | None":
        """The run that has to be finished before this one."""
        if self.is_warm_up:
            return Run(self.init_from, self.architecture, self.seed) if self.init_from else None
        return replace(self, masked=False) if self.masked else self.warm_up

    @property
    def is_trained(self) -> bool:
        """Whether this changes the weights of a warm-up."""
        return self.control not in ("", START)

    @property
    def command(self) -> str:
        """The subcommand of `hybridmem` that makes it."""
        return "validate" if self.control == START else "fit"

    @property
    def label(self) -> str:
        """The control and its target, where that is not attention itself."""
        shaped = f"{self.control} on {self.target}" if self.target not in ("", "attention") else self.control
        return f"{shaped}, masked" if self.masked else shaped

    @property
    def folder(self) -> Path:
        """Where it lives, below the grid's folder."""
        name = (self.label or "warm-up").replace(" + ", "+").replace(", ", "-").replace(" ", "-")
        return Path(self.task) / self.architecture / name / f"seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.task} {self.architecture} {self.label or 'warm-up'} seed {self.seed}"


def check_grid(tasks: dict[str, Comparison]) -> None:
    """Raise a ValueError that names the setting for a grid that cannot run."""
    if not tasks:
        raise ValueError("tasks is empty: name at least one")
    for name, task in tasks.items():
        for given in (name, *task.architectures, *task.controls):
            if not isinstance(given, str):  # folders are called so
                raise ValueError(f"tasks.{name}: YAML reads the name {given!r} as no text: put it in quotes")
        for setting in ("warm_up", "train"):
            path = getattr(task, setting)
            if not path.is_file():
                raise ValueError(f"tasks.{name}.{setting}={path} does not exist: give a configuration of hybridmem fit")
        for setting in ("architectures", "controls", "targets", "seeds"):
            if not getattr(task, setting):
                raise ValueError(f"tasks.{name}.{setting} is empty: name at least one")
        if len(set(task.seeds)) < len(task.seeds):
            raise ValueError(f"tasks.{name}.seeds={task.seeds} names a seed twice")
        if START in task.controls:
            raise ValueError(f"tasks.{name}.controls: {START!r} is the name of the warm-up itself; choose another")
        unknown = sorted(set(task.targets) - set(TARGETS))
        if unknown:
            raise ValueError(f"tasks.{name}.targets: {unknown[0]!r} is none of {', '.join(TARGETS)}")
        if task.init_from is not None:
            _check_init_from(name, task, tasks)
        for architecture in task.architectures:
            for variant in _variants(task, architecture):
                if variant not in VARIANTS:
                    raise ValueError(
                        f"tasks.{name}.architectures.{architecture}: variant {variant!r} is none of "
                        f"{', '.join(VARIANTS)}"
                    )
        labels = list(dict.fromkeys(cell.label for cell in _cells(name, task)))
        unmade = [label for label in task.masked if label not in labels]
        if unmade:
            raise ValueError(f"tasks.{name}.masked: {unmade[0]!r} is none of {', '.join(labels)}")


def _check_init_from(name: str, task: Comparison, tasks: dict[str, Comparison]) -> None:
    setting, other = f"tasks.{name}.init_from={task.init_from!r}", tasks.get(str(task.init_from))
    if other is None or other is task:
        raise ValueError(f"{setting} is no other task of the grid: {', '.join(tasks)}")
    if other.init_from is not None:
        raise ValueError(f"{setting} has an init_from itself: begin with {other.init_from!r}")
    lacking = [each for each in task.architectures if other.architectures.get(each) != task.architectures[each]]
    lacking += [f"seed {seed}" for seed in task.seeds if seed not in other.seeds]
    if lacking:
        raise ValueError(f"{setting} has no warm-up of the same {lacking[0]}: give both tasks the same ones")


def plan(tasks: dict[str, Comparison]) -> tuple[list[Run], list[Run]]:
    """All warm-ups, and all cells: first seeds first, so that a grid which is stopped early holds whole tables."""
    cells = [cell for name, task in tasks.items() for cell in _cells(name, task)]
    cells.sort(key=lambda cell: tasks[cell.task].seeds.index(cell.seed))
    warm_ups = sorted(dict.fromkeys(cell.warm_up for cell in cells), key=lambda run: run.after is not None)
    return warm_ups, cells


def without_attention(task: Comparison) -> dict[str, str]:
    """Of each control with an AttentionRL, the one that has the same objectives without it; alone it is the start."""
    found = {}
    for control, objectives in task.controls.items():
        others = [part for part in objectives if not _is_attention_rl(part)]
        alike = [name for name, parts in task.controls_and_start.items() if name != START and list(parts) == others]
        if len(others) < len(objectives) and (alike or not others):
            found[control] = alike[0] if others else START
    return found


def fit_options(run: Run, task: Comparison, root: Path) -> dict[str, Any]:
    """The options with which `hybridmem fit` makes a run below `root`."""
    common = {
        "seed_everything": run.seed,
        "trainer.default_root_dir": str(root / run.folder),
        "trainer.enable_progress_bar": False,
        "data.init_args.seed": run.seed,
        **task.options,
    }
    if run.is_warm_up:
        architecture = {f"model.init_args.config.{k}": v for k, v in task.architectures[run.architecture].items()}
        if run.after is not None:
            common["model.init_args.init_from"] = str(root / run.after.folder / "last.ckpt")
        return _watched({"config": str(task.warm_up), **common, **architecture, **task.warm_up_options})
    options = {
        "config": str(task.train),
        **common,
        "model.init_args.model": str(root / run.warm_up.folder / "last.ckpt"),
        "model.init_args.objectives": _objectives(task.controls_and_start[run.control], run.target),
        "model.init_args.seed": run.seed,
        **task.train_options,
    }
    if not run.masked:
        return _watched(options)
    mask = {"mask": str(root / replace(run, masked=False).folder / MASK)}
    return _watched(options, {"class_path": "hybridmem.training.SubnetworkMask", "init_args": mask})


def _watched(options: dict[str, Any], *callbacks: dict[str, Any]) -> dict[str, Any]:
    """The options with ComputeSpent and further callbacks among those that they add."""
    added = [{"class_path": "hybridmem.training.ComputeSpent"}, *callbacks, *options.get(CALLBACKS, [])]
    return options | {CALLBACKS: added}


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Options as `hybridmem fit` reads them."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def _cells(name: str, task: Comparison) -> Iterator[Run]:
    for architecture in task.architectures:
        has_memory = bool(set(_variants(task, architecture)) & set(MEMORY_VARIANTS))
        possible = task.targets if has_memory else [target for target in task.targets if target == "attention"]
        for control, objectives in task.controls_and_start.items():
            for target in _targets(objectives, possible):
                runs = [Run(name, architecture, seed, control, target, init_from=task.init_from) for seed in task.seeds]
                yield from runs
                if runs[0].label in task.masked:
                    yield from (replace(run, masked=True) for run in runs)


def _targets(objectives: Objectives, possible: list[str]) -> list[str]:
    """What AttentionRL shapes; a control without it, or with a target of its own, runs once."""
    own = [part.get("init_args", {}).get("target", "") for part in objectives if _is_attention_rl(part)]
    if not own:
        return [""]
    return own if own[0] else possible


def _variants(task: Comparison, architecture: str) -> list[str]:
    """The variants of an architecture's layers, the warm-up's where it changes none."""
    config = yaml.safe_load(task.warm_up.read_text())["model"]["init_args"].get("config", {})
    config = config | task.architectures[architecture]
    return list(config.get("layer_types") or [config.get("variant", "mag")])


def _objectives(objectives: Objectives, target: str) -> list[dict[str, Any]]:
    if not target:
        return list(objectives)
    return [
        {**part, "init_args": {**part.get("init_args", {}), "target": target}} if _is_attention_rl(part) else part
        for part in objectives
    ]


def _is_attention_rl(objective: dict[str, Any]) -> bool:
    return str(objective.get("class_path", "")).rsplit(".", 1)[-1] == "AttentionRL"
