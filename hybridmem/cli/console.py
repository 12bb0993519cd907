"""A console without lines of other packages that users cannot act on."""

import logging
import warnings

RANK_ZERO_LOGGER = "lightning.pytorch.utilities.rank_zero"
USELESS_WARNINGS = (
    (".*LeafSpec.*", FutureWarning),  # Lightning calls an API that torch has deprecated
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),  # PEFT reads a name that transformers has deprecated
    (".*in eval mode at the start of training.*", Warning),  # PolicyModule disables dropout on purpose
    ("Checkpoint directory .* exists and is not empty", Warning),  # it holds the run's lock, or the run resumes
)


def hide_useless_lines() -> None:
    """Hide warnings that users cannot act on, and advertisements for other packages."""
    for message, category in USELESS_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    logging.getLogger(RANK_ZERO_LOGGER).addFilter(is_useful)


def is_useful(record: logging.LogRecord) -> bool:
    """Return True unless a line is one of Lightning's tips or reports a missing TPU."""
    message = record.getMessage()
    return "Tip: " not in message and not message.startswith("TPU available: False")
