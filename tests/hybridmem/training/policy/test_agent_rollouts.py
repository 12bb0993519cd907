"""Training in environments from the command line: supervised warm-up, multi-turn rollouts and a final reward."""

from typing import Any

import pytest
from matplotlib.figure import Figure

from hybridmem.tasks.task import Split
from tests.hybridmem.training.runs import hybridmem, logged

from .test_module import TOKENS, write_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
SWE = {"class_path": "hybridmem.rl.SWEDapo", "init_args": {"free_turns": 2}}
ATTENTION = {"class_path": "hybridmem.rl.AttentionRL", "init_args": {}}
REJECTION = {"class_path": "hybridmem.rl.RejectionFineTune", "init_args": {}}
SUPERVISED = {"class_path": "hybridmem.rl.SFT"}


class Doors:
    """Environment with two doors, one of which leads out; the other one answers no."""

    def reset(self, answer: str, **columns: Any) -> str | None:
        """Start an episode."""
        self.answer, self.found, self.done = answer, False, False
        return None

    def get_reward(self) -> float:
        """Return 1 after the right door was opened, else 0."""
        return float(self.found)

    def a(self) -> str:
        """Open the first door."""
        return self._open("a")

    def b(self) -> str:
        """Open the second door."""
        return self._open("b")

    def _open(self, door: str) -> str:
        self.found = self.done = door == self.answer
        return "no"


class Impatient(Doors):
    """Environment that rewards a single attempt more than two."""

    def reset(self, answer: str, **columns: Any) -> str | None:
        """Start an episode without attempts."""
        self.attempts = 0
        return super().reset(answer)

    def get_reward(self) -> float:
        """Return the share of attempts that were right."""
        return float(self.found) / max(1, self.attempts)

    def _open(self, door: str) -> str:
        self.attempts += 1
        return super()._open(door)


class TwoDoors:
    """Task whose solution is to try a, then b."""

    environment = Doors

    @property
    def max_completion_length(self) -> int:
        """Return room for a few turns."""
        return 20

    def example(self, split: Split, index: int) -> dict[str, Any]:
        """Return an example whose prompt does not reveal the right door."""
        right = "ab"[index % 2]
        turns = [("a", "no"), ("b", "")] if right == "b" else [("a", "")]
        return {"prompt": "door", "answer": right, "turns": turns}

    def reward(self, prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """Raise an error, because the environment provides the reward."""
        raise AssertionError("not asked")


class Moody(Doors):
    """Environment with a different first observation in every episode."""

    begun = 0

    def reset(self, answer: str, **columns: Any) -> str | None:
        """Return a different text each time."""
        Moody.begun += 1
        super().reset(answer)
        return f", attempt {Moody.begun}"


def acting(folder, **changes):
    changes = {"data__init_args__task": f"{__name__}.TwoDoors", "model__init_args__num_iterations": 1, **changes}
    return write_config(folder, **{"model__init_args__max_turns": 4, **changes})


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Train a policy on the demonstrations and return its checkpoint."""
    folder = tmp_path_factory.mktemp("taught")
    settings = dict(model__init_args__objectives=[SUPERVISED], trainer__max_steps=150, trainer__val_check_interval=150)
    with pytest.MonkeyPatch.context() as monkeypatch:
        hybridmem(monkeypatch, "fit", "--config", acting(folder, **settings))
    assert logged(folder, "val/accuracy")[-1] == 1
    assert logged(folder, "val/turns")[-1] == pytest.approx(1.5, abs=0.3)
    return folder / "run" / "step=150.ckpt"


@pytest.mark.parametrize("objectives", [[SWE], [SWE, ATTENTION], [REJECTION]], ids=["tokens", "both", "rejection"])
def test_it_learns_in_an_environment(tmp_path, monkeypatch, taught, objectives):
    changes = {"model__init_args__objectives": objectives, "model__init_args__steps_per_generation": 2}
    config = acting(tmp_path, model__init_args__model=str(taught), trainer__max_steps=4, **changes)
    hybridmem(monkeypatch, "fit", "--config", config)
    assert all(0 < value <= 4 for value in logged(tmp_path, "turns/mean"))
    assert all(0 <= value <= 1 for value in logged(tmp_path, "tools/failure_frequency"))
    difference = logged(tmp_path, "sampling/sampling_logp_difference/max")
    assert max(difference) < 1e-4
    if objectives == [REJECTION]:
        assert max(logged(tmp_path, "rejection/kept")) > 0
    else:
        assert len(logged(tmp_path, "reward/shaped")) == len(logged(tmp_path, "reward"))


@pytest.mark.parametrize("unit", ["head", "token"])
def test_allocations_are_learned_in_an_environment(tmp_path, monkeypatch, taught, unit):
    settings = {"unit": unit, "prefill": "allocated"}
    objectives = [TOKENS, {"class_path": "hybridmem.rl.AllocationRL", "init_args": settings}]
    changes = {"model__init_args__objectives": objectives, "trainer__max_steps": 2}
    changes["model__init_args__environment_factory"] = f"{__name__}.Impatient"
    hybridmem(monkeypatch, "fit", "--config", acting(tmp_path, model__init_args__model=str(taught), **changes))
    assert all(0 < cost < 1 for cost in logged(tmp_path, "allocation/cost"))
    assert max(logged(tmp_path, "sampling/sampling_logp_difference/max")) < 1e-4  # scored under the same decisions


def test_a_trajectory_that_was_solved_is_drawn(tmp_path, monkeypatch, taught):
    maps = {"class_path": "hybridmem.training.AttentionMaps", "init_args": {"every_n_steps": 1}}
    changes = {"model__init_args__objectives": [SWE], "trainer__callbacks": [maps], "trainer__max_steps": 2}
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, title: titles.append(title))
    hybridmem(monkeypatch, "fit", "--config", acting(tmp_path, model__init_args__model=str(taught), **changes))
    assert titles[0] == "solved"
    assert len(list((tmp_path / "run" / "attention_maps").glob("*.png"))) == len(titles) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(call_format="xml"), "call_format must be"),
        (dict(max_turns=0), "max_turns must be at least 1"),
        (dict(environment_factory=f"{__name__}.Moody"), "returned 2 different texts for one example"),
        (dict(environment_factory="pathlib.Path"), "lacks a method reset"),
        (dict(objectives=[REJECTION, SWE]), "RejectionFineTune learns from solved trajectories only"),
        (
            dict(objectives=[{"class_path": "hybridmem.rl.AttentionRL", "init_args": {"exploration": 1.0}}]),
            "AttentionRL's exploration supports single turns only",
        ),
    ],
)
def test_impossible_settings_give_one_line_errors(tmp_path, monkeypatch, capsys, changes, message):
    changes = {"objectives": [SWE], **changes}
    config = acting(tmp_path, **{f"model__init_args__{name}": value for name, value in changes.items()})
    with pytest.raises(SystemExit):
        hybridmem(monkeypatch, "fit", "--config", config)
    assert message in capsys.readouterr().err
