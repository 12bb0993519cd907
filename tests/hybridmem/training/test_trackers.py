"""Figures and tables in trackers: TensorBoard itself, and stand-ins for the modules wandb and mlflow."""

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger, mlflow, wandb
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybridmem.training.trackers import check_packages, log_figure, log_table
from tests.hybridmem.training.runs import hybridmem, logged, write_config
from tests.unchecked import ROOT

COLUMNS, ROWS = ("prompt", "reward"), [("a", 0.5), ("b", 1.0)]


def figure() -> Figure:
    drawn = Figure(figsize=(1, 1), dpi=50)
    drawn.subplots().plot([0, 1])
    return drawn


def stand_in(monkeypatch, name: str, **content) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def wandb_run(monkeypatch):
    """A stand-in for the package wandb; its run records everything that is logged."""
    logs: list[dict] = []

    class Run:
        def log(self, values, **_):
            logs.append(values)

        def define_metric(self, *_, **__):
            pass

    stand_in(monkeypatch, "wandb.wandb_run", Run=Run)
    stand_in(monkeypatch, "wandb.sdk.lib", RunDisabled=type("RunDisabled", (), {}))
    stand_in(monkeypatch, "wandb.sdk")
    content = dict(Image=lambda image: image, Table=lambda **given: given, run=None)
    stand_in(monkeypatch, "wandb", **content)
    monkeypatch.setattr(wandb, "_WANDB_AVAILABLE", True)
    return SimpleNamespace(logger=WandbLogger(experiment=Run()), logs=logs)


@pytest.fixture
def mlflow_run(monkeypatch):
    """A stand-in for the package mlflow; its client records images and tables by their place."""
    kept: dict[str, object] = {}

    class MlflowClient:
        def __init__(self, uri):
            pass

        def get_run(self, run_id):
            return SimpleNamespace(info=SimpleNamespace(experiment_id="0"))

        def log_image(self, run_id, image, artifact_file):
            kept[f"{run_id}/{artifact_file}"] = image

        def log_table(self, run_id, data, artifact_file):
            kept[f"{run_id}/{artifact_file}"] = data

    stand_in(monkeypatch, "mlflow.tracking", MlflowClient=MlflowClient)
    stand_in(monkeypatch, "mlflow", set_tracking_uri=lambda _: None)
    monkeypatch.setattr(mlflow, "_MLFLOW_AVAILABLE", True)
    return SimpleNamespace(logger=MLFlowLogger(run_id="7", tracking_uri="file:nowhere"), kept=kept)


def test_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    log_figure([logger], "maps", figure(), 3)
    log_table([logger], "rows", COLUMNS, ROWS, 4)
    logger.experiment.flush()
    board = EventAccumulator(str(tmp_path)).Reload()
    assert board.Images("maps")[0].step == 3
    (event,) = board.Tensors("rows/text_summary")
    assert event.step == 4
    assert event.tensor_proto.string_val[0].decode() == "| prompt | reward |\n|---|---|\n| a | 0.5 |\n| b | 1 |"


def test_weights_and_biases(wandb_run):
    log_figure([wandb_run.logger], "maps", figure(), 3)
    log_table([wandb_run.logger], "rows", COLUMNS, ROWS, 4)
    images, table = wandb_run.logs
    assert images["trainer/global_step"] == 3
    assert images["maps"][0].size == (50, 50)
    assert table["trainer/global_step"] == 4
    assert table["rows"]["columns"] == ["prompt", "reward"]
    assert table["rows"]["data"] == [["a", 0.5], ["b", 1.0]]


def test_mlflow(mlflow_run):
    log_figure([mlflow_run.logger], "maps/layer_1", figure(), 3)
    log_table([mlflow_run.logger], "rows", COLUMNS, ROWS, 4)
    assert mlflow_run.kept["7/maps/layer_1/step_3.png"].size == (50, 50)
    assert mlflow_run.kept["7/rows/step_4.json"] == {"prompt": ["a", "b"], "reward": [0.5, 1.0]}


def test_other_loggers_are_left_alone(tmp_path):
    logger = CSVLogger(tmp_path)
    log_figure([logger], "maps", figure(), 3)
    log_table([logger], "rows", COLUMNS, ROWS, 4)
    assert not logger.experiment.metrics
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("name", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_missing_package_names_its_installation(name, package, monkeypatch):
    monkeypatch.setattr("hybridmem.training.trackers.find_spec", lambda _: None)
    settings = {"class_path": f"lightning.pytorch.loggers.{name}"}
    for given in (settings, [settings]):
        with pytest.raises(
            ModuleNotFoundError, match=f"{name} needs {package}, which is missing: pip install {package}"
        ):
            check_packages(given)
    for given in (None, True, False, [], {"class_path": "lightning.pytorch.loggers.CSVLogger"}):
        check_packages(given)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_run_without_the_package_ends_with_one_line(tmp_path, monkeypatch, capsys):
    overlay = ROOT / "configs" / "loggers" / "wandb.yaml"
    with pytest.raises(SystemExit) as stopped:
        hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path), "--config", overlay)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("which is missing: pip install wandb")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trackers_come_with_the_csv_files_that_reports_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overlay = ROOT / "configs" / "loggers" / "tensorboard.yaml"
    hybridmem(monkeypatch, "fit", "--config", write_config(tmp_path), "--config", overlay)
    assert len(logged(tmp_path, "train/loss")) == 6
    assert (tmp_path / "runs" / "tensorboard" / "version_0").is_dir()
    assert not (tmp_path / "run" / "tensorboard").exists()
