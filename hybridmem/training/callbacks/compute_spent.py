"""Cost of a training run in seconds, tokens and floating-point operations."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode


def _operations_in_place(summand: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * left[0] * left[1] * left[2] * right[2]


# The memory's batched matrix products, which torch's counter lacks.
UNCOUNTED = {torch.ops.aten.baddbmm_: _operations_in_place}


class ComputeSpent(L.Callback):
    """Callback that writes the cost of training, without validation, to compute.json in trainer.default_root_dir.

    * `seconds` spent in training batches, on this process
    * `tokens` read by the model for sampling and learning, counting each position once per pass
    * `flops` of matrix products and attention, forward and backward, measured on the first batch after each start and
      multiplied by the number of batches
    * `steps` of the optimiser, and the number of trained `parameters`

    A resumed run continues the counts of its checkpoint.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {"seconds": 0.0, "tokens": 0, "flops": 0, "batches": 0}
        self._counter: FlopCounterMode | None = None
        self._flops_of_batch = 0
        self._began: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting the tokens of forward passes."""
        model: Any = pl_module.model
        self._hook = model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Start the clock, and the FLOP counter for the first batch."""
        if self._counter is None:
            self._counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
            self._counter.__enter__()
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Add the batch's seconds and operations."""
        assert self._began is not None
        assert self._counter is not None
        self.spent["seconds"] += time.perf_counter() - self._began
        self._began = None
        if not self._flops_of_batch:
            self._counter.__exit__(None, None, None)
            self._flops_of_batch = self._counter.get_total_flops()
        self.spent["flops"] += self._flops_of_batch
        self.spent["batches"] += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the totals."""
        self._hook.remove()
        if not trainer.is_global_zero:
            return
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        path = Path(trainer.default_root_dir) / "compute.json"
        path.write_text(json.dumps({**self.spent, "steps": trainer.global_step, "parameters": trained}) + "\n")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop the FLOP counter."""
        if self._counter is not None and not self._flops_of_batch:
            self._counter.__exit__(None, None, None)
        self._counter = None

    def state_dict(self) -> dict[str, Any]:
        """Return the totals."""
        return dict(self.spent)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the totals."""
        self.spent = dict(state_dict)

    def _count_tokens(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._began is None:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        read = ids if ids is not None else kwargs["inputs_embeds"]
        self.spent["tokens"] += read.shape[0] * read.shape[1]
