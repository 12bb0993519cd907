"""Which parameters decay, and two optimisers as one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridmem.model.convolution import ShortConvolution

OptimizerFactory = Callable[[Iterable], Optimizer]  # made with parameter groups


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay; vectors, embeddings and short convolutions do not."""
    kept = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | ShortConvolution)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1 and id(p) not in kept]
    others = [p for p in parameters if p.dim() <= 1 or id(p) in kept]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def split_matrices(model: nn.Module) -> tuple[list[Tensor], set[int]]:
    """The hidden layers' matrices, which Muon is made for, and their identities."""
    head = {id(m.weight) for name, m in model.named_modules() if name.endswith("lm_head")}
    matrices = [
        m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear) and m.weight.requires_grad and id(m.weight) not in head
    ]
    return matrices, {id(p) for p in matrices}


class MatrixOptimizer(Optimizer):
    """One optimiser for the hidden layers' matrices, another for all the rest, as one to the trainer.

    Args:
        model: whose parameters are trained.
        matrices: makes the optimiser of the matrices (torch.optim.Muon).
        others: makes the optimiser of everything else (torch.optim.AdamW).
    """

    def __init__(
        self, model: nn.Module, matrices: Callable[[Iterable], Optimizer], others: Callable[[Iterable], Optimizer]
    ):
        chosen, identities = split_matrices(model)
        rest = [
            {**group, "params": [p for p in group["params"] if id(p) not in identities]}
            for group in decay_groups(model)
        ]
        self.parts = [matrices(chosen), others([group for group in rest if group["params"]])]
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {})
        # The parts and the whole share their groups, so that a scheduler's learning rate reaches both.
        self.param_groups = groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        if "parts" not in state_dict:
            raise ValueError(
                "the checkpoint was written without matrix_optimizer: resume with the optimisers of the checkpoint, or "
                "start a new run"
            )
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
