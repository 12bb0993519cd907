"""A console with one-line errors, and without lines of other packages that users cannot act on."""

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from transformers.utils.logging import disable_progress_bar

from hybridmem.training.errors import SettingsError, StoppedError

from .parsing import SETTINGS_ERRORS, CommandParser, one_line

FORMAT_WARNING = warnings.formatwarning
PACKAGE = Path(__file__).parents[1]
INTERRUPTED = 128 + signal.SIGINT  # exit status after Ctrl-C
HUB_LOGGER = "huggingface_hub.utils._http"  # of one line for each attempt to reach the hub
RANK_ZERO_LOGGER = "lightning.pytorch.utilities.rank_zero"
USELESS_WARNINGS = (
    (".*LeafSpec.*", FutureWarning),  # Lightning calls an API that torch has deprecated
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),  # PEFT reads a name that transformers has deprecated
    (".*in eval mode at the start of training.*", Warning),  # PolicyModule disables dropout on purpose
    (".*ModelCheckpoint with manual optimization", Warning),  # checkpoints hold the weights after the step on purpose
    ("Checkpoint directory .* exists and is not empty", Warning),  # it holds the run's lock, or the run resumes
)


def run_script(main: Callable[..., Any]) -> None:
    """Run the main function of a script, with its parameters as options and one-line errors.

    Errors from the script's own code keep their traceback.
    """
    hide_useless_lines()
    with one_line_exits(Path(sys.argv[0]).name):
        try:
            auto_cli(main, as_positional=False, parser_class=CommandParser)
        except BrokenPipeError:
            raise
        except SETTINGS_ERRORS as error:
            if is_raised_in(main.__code__.co_filename, error):
                raise
            raise SettingsError(one_line(str(error))) from error


def is_raised_in(script: str, error: Exception) -> bool:
    """Return True if the script raised an error itself, or within a function that it gave to a library."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    own = [place for place, filename in enumerate(frames) if filename == script]
    return bool(own) and (own[-1] == len(frames) - 1 or own[-1] - own[0] >= len(own))


@contextmanager
def one_line_exits(program: str) -> Iterator[None]:
    """Exit with one line: with 2 on errors in settings, with 1 if a run cannot continue, with 130 on Ctrl-C."""
    try:
        yield
    except SettingsError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except StoppedError as error:
        print(f"{program}: stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # as in `hybridmem … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as exit:
        # Lightning turns Ctrl-C into exit status 1, which would mean an error.
        sys.exit(INTERRUPTED if isinstance(exit.__context__, KeyboardInterrupt) else exit.code)


def hide_useless_lines() -> None:
    """Hide warnings that users cannot act on, advertisements for other packages, and progress bars of weights."""
    for message, category in USELESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    logging.getLogger(RANK_ZERO_LOGGER).addFilter(is_useful)
    logging.getLogger(HUB_LOGGER).addFilter(Once())
    warnings.formatwarning = format_warning
    disable_progress_bar()


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning of this package in one line, and others with the place of their code."""
    if Path(filename).is_relative_to(PACKAGE):
        return f"warning: {message}\n"
    return FORMAT_WARNING(message, category, filename, lineno, line)


class Once(logging.Filter):
    """Filter that lets the first line through."""

    passed = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for the first line."""
        passed, self.passed = self.passed, True
        return not passed


def is_useful(record: logging.LogRecord) -> bool:
    """Return True unless a line is one of Lightning's tips or reports a missing GPU or TPU."""
    message = record.getMessage()
    return "Tip: " not in message and not message.startswith(("GPU available: False", "TPU available: False"))
