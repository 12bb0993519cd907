"""Grid of a comparison: tasks × architectures × controls × targets × seeds."""

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
    """Options of `hybridmem fit` as written in the configuration, with classes left uninstantiated."""


class Objectives(UserList[dict[str, Any]]):
    """Objectives as `hybridmem fit` reads them, with class_path and init_args."""


# In plain dicts and lists, the parser would instantiate everything with a class_path.
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
CALLBACKS = "trainer.callbacks+"  # appends to the configuration's list
MASK = "mask.safetensors"  # mask of the weights that a cell changed, in its folder
START = "start"  # the warm-up, or the model without one, validated like the cells
ACCURACY = "val/accuracy"


@dataclass
class Comparison:
    """One task of the grid, whose cells all start from the warm-up with their architecture and seed.

    Args:
        warm_up: configuration of `hybridmem fit` for the supervised warm-up. None: cells start from the model that
            `train` or their architecture names, such as a converted one.
        train: configuration of `hybridmem fit` with a PolicyModule; cells only change its objectives.
        architectures: changes to the warm-up's model.init_args.config, by architecture name. Without a warm-up: dotted
            options of `hybridmem fit` for cells, such as model.init_args.model.
        controls: objectives in the format of `hybridmem fit`, by control name.
        targets: targets of AttentionRL, for controls that use it and architectures with such a distribution.
        masked: controls to run a second time from the same start, training only the weights that the first run changed.
            Use the names in the report, which include targets.
        seeds: seeds of weights, data order and rollouts.
        metric: validation metric to compare, a share for which higher is better.
        warm_up_options: additional dotted options of `hybridmem fit` for warm-ups.
        train_options: additional dotted options of `hybridmem fit` for cells.
        control_options: additional dotted options of single controls, by control name, which come last.
        options: additional dotted options for both, such as the task's settings.
        init_from: an easier task of the grid. Each warm-up starts from the weights of that task's warm-up with the same
            architecture and seed.
    """

    warm_up: Path | None
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
    control_options: dict[str, FitOptions] = field(default_factory=dict)
    options: FitOptions = field(default_factory=FitOptions)
    init_from: str | None = None

    @property
    def controls_and_start(self) -> dict[str, Objectives]:
        """Controls, preceded by the start, which only validates and ignores its objectives."""
        return {START: SUPERVISED, **self.controls}


@dataclass(frozen=True)
class Run:
    """Run of `hybridmem`: a warm-up, its validation or a cell of the grid."""

    task: str
    architecture: str
    seed: int
    control: str = ""  # empty for a warm-up
    target: str = ""  # target of AttentionRL, if the control uses it
    masked: bool = False  # train only the weights that the same run without a mask changed
    init_from: str | None = None  # task whose warm-up this task's warm-up starts from
    learns: bool = True  # False for controls that are only validated
    warmed_up: bool = True  # False if cells start from a model that the configuration names

    @property
    def is_warm_up(self) -> bool:
        """True for a supervised warm-up, False for a cell."""
        return not self.control

    @property
    def warm_up(self) -> "Run | None":
        """Warm-up that a cell starts from, or None."""
        return Run(self.task, self.architecture, self.seed, init_from=self.init_from) if self.warmed_up else None

    @property
    def after(self) -> "Run | None":
        """Run that must finish before this one, or None."""
        if self.is_warm_up:
            return Run(self.init_from, self.architecture, self.seed) if self.init_from else None
        return replace(self, masked=False) if self.masked else self.warm_up

    @property
    def is_trained(self) -> bool:
        """True for cells that train, False for warm-ups and for cells that are only validated."""
        return bool(self.control) and self.learns

    @property
    def command(self) -> str:
        """Subcommand of `hybridmem` for this run."""
        return "fit" if self.learns else "validate"

    @property
    def label(self) -> str:
        """Control, with its target unless that is attention, and a note for masked runs."""
        shaped = f"{self.control} on {self.target}" if self.target not in ("", "attention") else self.control
        return f"{shaped}, masked" if self.masked else shaped

    @property
    def folder(self) -> Path:
        """Folder of the run, relative to the grid's folder."""
        name = (self.label or "warm-up").replace(" + ", "+").replace(", ", "-").replace(" ", "-")
        return Path(self.task) / self.architecture / name / f"seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.task} {self.architecture} {self.label or 'warm-up'} seed {self.seed}"


def check_grid(tasks: dict[str, Comparison]) -> None:
    """Raise a ValueError if the grid cannot run, naming the setting at fault."""
    if not tasks:
        raise ValueError("tasks is empty; add at least one")
    for name, task in tasks.items():
        for given in (name, *task.architectures, *task.controls):
            if not isinstance(given, str):  # names become folder names
                raise ValueError(f"tasks.{name}: YAML does not read the name {given!r} as text; put it in quotes")
        for setting in ("warm_up", "train"):
            path = getattr(task, setting)
            if path is not None and not path.is_file():
                raise ValueError(f"tasks.{name}.{setting}={path} does not exist; give a configuration of hybridmem fit")
        for setting in ("architectures", "controls", "targets", "seeds"):
            if not getattr(task, setting):
                raise ValueError(f"tasks.{name}.{setting} is empty; add at least one")
        if len(set(task.seeds)) < len(task.seeds):
            raise ValueError(f"tasks.{name}.seeds={task.seeds} contains a seed twice; remove one")
        if START in task.controls:
            raise ValueError(f"tasks.{name}.controls: {START!r} is reserved for the warm-up; choose another name")
        _check_control_options(name, task)
        unknown = sorted(set(task.targets) - set(TARGETS))
        if unknown:
            raise ValueError(f"tasks.{name}.targets: {unknown[0]!r} is unknown; choose from {', '.join(TARGETS)}")
        if task.warm_up is None:
            _check_without_warm_up(name, task)
        if task.init_from is not None:
            _check_init_from(name, task, tasks)
        for architecture in task.architectures:
            for variant in _variants(task, architecture):
                if variant not in VARIANTS:
                    raise ValueError(
                        f"tasks.{name}.architectures.{architecture}: variant {variant!r} is unknown; choose from "
                        f"{', '.join(VARIANTS)}"
                    )
        labels = list(dict.fromkeys(cell.label for cell in _cells(name, task) if cell.learns))
        unmade = [label for label in task.masked if label not in labels]
        if unmade:
            raise ValueError(
                f"tasks.{name}.masked: {unmade[0]!r} is not trained in the grid; choose from {', '.join(labels)}"
            )


def _check_control_options(name: str, task: Comparison) -> None:
    for control in task.control_options:
        if control not in task.controls:
            choices = ", ".join(task.controls)
            raise ValueError(f"tasks.{name}.control_options: {control!r} is not a control; choose from {choices}")


def _check_without_warm_up(name: str, task: Comparison) -> None:
    for setting in ("warm_up_options", "masked", "init_from"):
        if getattr(task, setting):
            raise ValueError(f"tasks.{name}.{setting} needs a warm-up, and warm_up is null; remove it")
    for architecture, options in task.architectures.items():
        undotted = [option for option in options if "." not in option]
        if undotted:
            raise ValueError(
                f"tasks.{name}.architectures.{architecture}: {undotted[0]!r} is not an option of hybridmem fit; "
                "without a warm_up, give dotted options such as model.init_args.model"
            )


def _check_init_from(name: str, task: Comparison, tasks: dict[str, Comparison]) -> None:
    setting, other = f"tasks.{name}.init_from={task.init_from!r}", tasks.get(str(task.init_from))
    if other is None or other is task:
        raise ValueError(f"{setting} is not another task of the grid; choose from {', '.join(tasks)}")
    if other.warm_up is None:
        raise ValueError(f"{setting} has no warm-up; choose another task, or remove init_from")
    if other.init_from is not None:
        raise ValueError(f"{setting} has an init_from itself; use {other.init_from!r}")
    lacking = [each for each in task.architectures if other.architectures.get(each) != task.architectures[each]]
    lacking += [f"seed {seed}" for seed in task.seeds if seed not in other.seeds]
    if lacking:
        raise ValueError(f"{setting} has no warm-up with the same {lacking[0]}; give both tasks the same ones")


def plan(tasks: dict[str, Comparison]) -> tuple[list[Run], list[Run]]:
    """Return all warm-ups and all cells, ordered by seed, so that a grid stopped early has complete tables."""
    cells = [cell for name, task in tasks.items() for cell in _cells(name, task)]
    cells.sort(key=lambda cell: tasks[cell.task].seeds.index(cell.seed))
    found = dict.fromkeys(cell.warm_up for cell in cells if cell.warm_up is not None)
    return sorted(found, key=lambda run: run.after is not None), cells


def without_attention(task: Comparison) -> dict[str, str]:
    """Return, for each control with AttentionRL, the control with only its other objectives, or the start."""
    found = {}
    for control, objectives in task.controls.items():
        others = [part for part in objectives if not _is_attention_rl(part)]
        alike = [name for name, parts in task.controls_and_start.items() if name != START and list(parts) == others]
        if len(others) < len(objectives) and (alike or not others):
            found[control] = alike[0] if others else START
    return found


def fit_options(run: Run, task: Comparison, root: Path) -> dict[str, Any]:
    """Return the options of `hybridmem fit` for a run below `root`."""
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
    if run.warm_up is None:
        # The start's objective would train weights that cells may hold in bfloat16.
        frozen = {"model.init_args.frozen": True} if run.control == START else {}
        start = {**task.architectures[run.architecture], **frozen}
    else:
        start = {"model.init_args.model": str(root / run.warm_up.folder / "last.ckpt")}
    options = {
        "config": str(task.train),
        **common,
        **start,
        "model.init_args.objectives": _objectives(task.controls_and_start[run.control], run.target),
        "model.init_args.seed": run.seed,
        **task.train_options,
        **task.control_options.get(run.control, {}),
    }
    if not run.masked:
        return _watched(options)
    mask = {"mask": str(root / replace(run, masked=False).folder / MASK)}
    return _watched(options, {"class_path": "hybridmem.training.SubnetworkMask", "init_args": mask})


def _watched(options: dict[str, Any], *callbacks: dict[str, Any]) -> dict[str, Any]:
    """Return the options with ComputeSpent and further callbacks added."""
    added = [{"class_path": "hybridmem.training.ComputeSpent"}, *callbacks, *options.get(CALLBACKS, [])]
    return options | {CALLBACKS: added}


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Format options as command-line arguments of `hybridmem fit`."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def _cells(name: str, task: Comparison) -> Iterator[Run]:
    for architecture in task.architectures:
        possible = _possible_targets(task, architecture)
        for control, objectives in task.controls_and_start.items():
            settings: dict[str, Any] = {
                "init_from": task.init_from,
                "learns": control != START and _learns(objectives),
                "warmed_up": task.warm_up is not None,
            }
            for target in _targets(objectives, possible):
                runs = [Run(name, architecture, seed, control, target, **settings) for seed in task.seeds]
                yield from runs
                if runs[0].label in task.masked:
                    yield from (replace(run, masked=True) for run in runs)


def _targets(objectives: Objectives, possible: list[str]) -> list[str]:
    """Return the targets that a control runs with: one if AttentionRL is absent or has its own target, else all."""
    own = [part.get("init_args", {}).get("target", "") for part in objectives if _is_attention_rl(part)]
    if not own:
        return [""]
    return own if own[0] else possible


def _possible_targets(task: Comparison, architecture: str) -> list[str]:
    """Return the targets that an architecture has; all where a configuration names the model."""
    if task.warm_up is None or set(_variants(task, architecture)) & set(MEMORY_VARIANTS):
        return task.targets
    return [target for target in task.targets if target == "attention"]


def _variants(task: Comparison, architecture: str) -> list[str]:
    """Return the variants of an architecture's layers, with the warm-up's as the default; none without a warm-up."""
    if task.warm_up is None:
        return []
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
    return _class_name(objective) == "AttentionRL"


def _learns(objectives: Objectives) -> bool:
    return any(_class_name(objective) != "FixedAllocation" for objective in objectives)


def _class_name(objective: dict[str, Any]) -> str:
    return str(objective.get("class_path", "")).rsplit(".", 1)[-1]
