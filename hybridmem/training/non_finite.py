"""Messages of runs that end in NaN or inf."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L

from hybridmem.rl.rollouts.non_finite import NonFiniteLogits

from .checkpoints.durable import newest_good
from .errors import StoppedError


def non_finite_remedy(trainer: L.Trainer, alternative: str = "") -> str:
    """Return advice for a run with NaN or inf, including the checkpoint to resume from if there is one."""
    good = newest_good(Path(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir))
    resume = "" if good is None else f", then resume with --ckpt_path {good}"
    return f"lower the learning rate, check this step's data, rewards and gradient clipping{alternative}{resume}"


@contextmanager
def stopping_at_non_finite_logits(trainer: L.Trainer) -> Iterator[None]:
    """Convert a rollout's non-finite logits into the one-line error that ends the run.

    Raises:
        StoppedError: the logits are non-finite; the message names the layer, the optimiser step and the remedy.
    """
    try:
        yield
    except NonFiniteLogits as error:
        raise StoppedError(
            f"{error} in a rollout at optimiser step {trainer.global_step}: {non_finite_remedy(trainer)}"
        ) from error
