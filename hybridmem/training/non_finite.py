"""Messages of runs that end in NaN or inf."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L

from hybridmem.rl.rollouts.non_finite import NonFiniteLogits

from .checkpoints.durable import newest_good
from .errors import StoppedError


def non_finite_remedy(trainer: L.Trainer, alternative: str = "") -> str:
    """Return advice, with the checkpoint to continue from if there is one."""
    good = newest_good(Path(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir))
    resume = "" if good is None else f", and go on with --ckpt_path {good}"
    return f"lower the learning rate, look at the data of this step and at rewards and clipping{alternative}{resume}"


@contextmanager
def stopping_at_non_finite_logits(trainer: L.Trainer) -> Iterator[None]:
    """Turn non-finite logits of a rollout into the one line that ends a run.

    Raises:
        StoppedError: names layer, optimiser step and remedy.
    """
    try:
        yield
    except NonFiniteLogits as error:
        raise StoppedError(
            f"{error} in a rollout at optimiser step {trainer.global_step}: {non_finite_remedy(trainer)}"
        ) from error
