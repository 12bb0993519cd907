"""Recording of training runs: logged metrics, gradient norms, sampled tokens and weights.

Floats are stored as hexadecimal literals, which are exact, and tensors as SHA-256 digests of their bytes.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.optim import Optimizer

UNRECORDED = ("epoch", "train/tokens_per_second")  # tokens_per_second depends on timing
SHORT = 16  # hexadecimal digits of a step's weight digest
Record = dict[str, Any]


class GradientNorms(L.Callback):
    """Callback that records the global gradient norm after every backward pass, before clipping."""

    def __init__(self) -> None:
        self.norms: list[str] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the norm, from sums that do not depend on the parameters' order."""
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        squares = math.fsum(gradient.double().square().sum().item() for gradient in gradients)
        self.norms.append(math.sqrt(squares).hex())


class Notes(Logger):
    """Lightning logger that keeps a run in memory, with a recording reward function and a recording optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, list[str]] = {}
        self.gradients = GradientNorms()
        self.steps: list[str] = []
        self.sampled: list[list[str]] = []

    @property
    def name(self) -> str:
        """Return the logger's name."""
        return "notes"

    @property
    def version(self) -> int:
        """Return the logger's version."""
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Ignore hyperparameters."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append each metric to its series."""
        for name, value in metrics.items():
            if name not in UNRECORDED:
                self.metrics.setdefault(name, []).append(float(value).hex())

    def sampled_tokens(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[None]:
        """Record the tokens of all responses, and return zero rewards."""
        self.sampled.append([" ".join(map(str, ids)) for ids in completion_ids])
        return [None] * len(completion_ids)

    def optimizer(self, groups: Iterable[Any], **settings: Any) -> Optimizer:
        """Return an AdamW that records the weights after every step."""
        optimizer = torch.optim.AdamW(groups, **settings)
        optimizer.register_step_post_hook(self._note_weights)
        return optimizer

    def record(self, weights: dict[str, Tensor]) -> Record:
        """Return the complete record with the final weights."""
        return {
            "metrics": dict(sorted(self.metrics.items())),
            "gradient_norms": self.gradients.norms,
            "weights_by_step": self.steps,
            "sampled": self.sampled,
            "weights": weights_record(weights),
        }

    def _note_weights(self, optimizer: Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Sorted, so that the record does not depend on the order of the parameter groups.
        self.steps.append(digest(sorted(map(tensor_digest, parameters)))[:SHORT])


def adamw(notes: Notes, lr: float = 0.01) -> Callable[[Iterable[Any]], Optimizer]:
    """Return the factory of an AdamW whose steps are recorded."""
    return partial(notes.optimizer, lr=lr)


def weights_record(weights: dict[str, Tensor]) -> Record:
    """Return the sum of all weights, a digest of their bytes, and a digest of their names and shapes."""
    names = sorted(weights)
    return {
        "sum": math.fsum(weights[name].double().sum().item() for name in names).hex(),
        "sha256": digest(tensor_digest(weights[name]) for name in names),
        "names": digest(f"{name} {list(weights[name].shape)}" for name in names),
    }


def tensor_record(tensor: Tensor) -> list[str]:
    """Return the rows of a tensor, with floats in hexadecimal and integers and booleans in decimal."""
    rows = tensor.tolist() if tensor.dim() > 1 else [tensor.tolist()]
    return [" ".join(x.hex() if isinstance(x, float) else str(int(x)) for x in row) for row in rows]


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def digest(lines: Iterable[str]) -> str:
    """Return the SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
