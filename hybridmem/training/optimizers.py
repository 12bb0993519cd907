"""Parameter groups for weight decay, and two optimisers combined into one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hybridmem.model.convolution import ShortConvolution

OptimizerFactory = Callable[[Iterable], Optimizer]  # takes parameter groups


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices decay; vectors, embeddings and short convolutions do not."""
    kept = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | ShortConvolution)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() > 1 and id(p) not in kept]
    others = [p for p in parameters if p.dim() <= 1 or id(p) in kept]
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def split_matrices(model: nn.Module) -> tuple[list[Tensor], set[int]]:
    """Return the hidden layers' weight matrices, the parameters that Muon is designed for, and their ids."""
    head = {id(m.weight) for name, m in model.named_modules() if name.endswith("lm_head")}
    matrices = [
        m.weight
        for m in model.modules()
        if isinstance(m, nn.Linear) and m.weight.requires_grad and id(m.weight) not in head
    ]
    return matrices, {id(p) for p in matrices}


class MatrixOptimizer(Optimizer):
    """One optimiser for the hidden layers' matrices and one for all other parameters, combined for the trainer.

    Args:
        model: model to train.
        matrices: makes the optimiser of the matrices, such as torch.optim.Muon.
        others: makes the optimiser of all other parameters, such as torch.optim.AdamW.
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
        # Shared groups pass a scheduler's learning rate on to both optimisers.
        self.param_groups = groups

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both optimisers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both optimisers."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both optimisers."""
        if "parts" not in state_dict:
            raise ValueError(
                "the checkpoint was written without matrix_optimizer; set model.init_args.matrix_optimizer to null to "
                "resume, or start a new run"
            )
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
