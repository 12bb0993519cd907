"""Figures and tables in TensorBoard, Weights & Biases and MLflow."""

import html
import io
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image

PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
MARKDOWN = "\\`*_{}[]()#+-.!|~$"


def log_figure(loggers: Iterable[Logger], name: str, figure: Figure, step: int) -> None:
    """Show a figure in every tracker; other loggers ignore it."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture(figure)], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, picture(figure), f"{name}/step_{step}.png")


def log_table(
    loggers: Iterable[Logger], name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]], step: int
) -> None:
    """Show a table of text and numbers in every tracker; other loggers ignore it."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(columns, rows), step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            values = {column: [row[place] for row in rows] for place, column in enumerate(columns)}
            logger.experiment.log_table(logger.run_id, values, f"{name}/step_{step}.json")


def picture(figure: Figure) -> Image.Image:
    """Return a figure as an image."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    content.seek(0)
    return Image.open(content)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Format a table in Markdown, escaping markup in its text."""
    lines = [" | ".join(_cell(cell) for cell in row) for row in rows]
    head, *body = (f"| {line} |" for line in [" | ".join(columns), *lines])
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def check_packages(loggers: Any) -> None:
    """Check that the packages of configured trackers are installed.

    Args:
        loggers: trainer.logger from the configuration: settings of a class, a list of them, or a flag.

    Raises:
        ModuleNotFoundError: a package is missing; the message names the command that installs it.
    """
    for settings in loggers if isinstance(loggers, list) else [loggers]:
        name = "" if settings is None or isinstance(settings, bool) else str(settings.get("class_path"))
        package = PACKAGES.get(name.rsplit(".", 1)[-1])
        if package is not None and find_spec(package) is None:
            raise ModuleNotFoundError(f"trainer.logger={name} needs {package}, which is missing: pip install {package}")


def _cell(value: str | float) -> str:
    """Escape a value for a table cell."""
    if not isinstance(value, str):
        return f"{value:.4g}"
    shown = html.escape(value).replace("\r", "").replace("\n", "↵")
    return "".join(f"&#{ord(letter)};" if letter in MARKDOWN else letter for letter in shown)
