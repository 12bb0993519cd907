"""What a run costs: seconds, tokens and floating-point operations."""

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


# The memory's sums of products, which torch's counter does not know.
UNCOUNTED = {torch.ops.aten.baddbmm_: _operations_in_place}


class ComputeSpent(L.Callback):
    """Counts what training costs, validation left out, and writes it to compute.json in trainer.default_root_dir.

    * `seconds` between the start and the end of training batches, on this process;
    * `tokens` that the model read, while it sampled and while it learnt, each position of each pass once;
    * `flops` of matrix products and attention, forward and backward: those of the first batch after a start, times
      the batches; `steps`, optimiser steps, and `parameters` that are trained.

    A run that is resumed goes on counting where its checkpoint was.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {"seconds": 0.0, "tokens": 0, "flops": 0, "batches": 0}
        self._counter: FlopCounterMode | None = None
        self._flops_of_batch = 0
        self._began: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to the model's passes."""
        model: Any = pl_module.model
        self._hook = model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Start the clock, and for the first batch the counter of operations."""
        if self._counter is None:
            self._counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
            self._counter.__enter__()
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Add what the batch took."""
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
        """Write the sums."""
        self._hook.remove()
        if not trainer.is_global_zero:
            return
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        path = Path(trainer.default_root_dir) / "compute.json"
        path.write_text(json.dumps({**self.spent, "steps": trainer.global_step, "parameters": trained}) + "\n")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no counter running."""
        if self._counter is not None and not self._flops_of_batch:
            self._counter.__exit__(None, None, None)
        self._counter = None

    def state_dict(self) -> dict[str, Any]:
        """The sums."""
        return dict(self.spent)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from them."""
        self.spent = dict(state_dict)

    def _count_tokens(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._began is None:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        read = ids if ids is not None else kwargs["inputs_embeds"]
        self.spent["tokens"] += read.shape[0] * read.shape[1]
