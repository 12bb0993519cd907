"""Gradient accumulation weighted by tokens, with checkpoints in the middle of a step.

Lightning sums the gradients of loss / A over A = accumulate_grad_batches batches and averages them over R ranks. With
a mean over tokens in each batch, a short batch would weigh as much as a long one. Here a batch's loss is

    loss = sum of nats / unit           unit: one number for all batches and ranks of an optimiser step

A final factor of A · R · unit / (tokens of the step) turns the accumulated gradient into the gradient of the mean over
all tokens, as if the step were a single batch. `unit` is close to the number of tokens per batch and rank. Gradients
therefore keep their usual magnitude, which matters in float16.
"""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hybridmem.data.trainer_state import accumulations, batches_trained
from hybridmem.distributed import rank_and_size

Gradients = dict[str, Tensor]  # by parameter name


class Accumulation:
    """Token counts and progress of one optimiser step over several batches."""

    def __init__(self) -> None:
        self.sums: Float[Tensor, " sums"] | None = None  # tokens, nats and bytes of all ranks; None before a batch
        self.unit: Float[Tensor, ""] = torch.ones(())
        self.first = 0  # index of the step's first batch in the whole run
        self.backwards = 0  # backward passes begun
        self.next_place = 0  # position of the next batch among Lightning's accumulate_grad_batches
        self.is_complete = False  # True after the last backward pass

    def loss(
        self, trainer: L.Trainer, batch_idx: int, nats: Float[Tensor, "batch time"], labels: Tensor, num_bytes: Tensor
    ) -> Float[Tensor, ""]:
        """Add this rank's batch to the counts and return its loss; the caller runs the backward pass next."""
        counts = [(labels != -100).sum(), nats.detach().double().sum(), num_bytes.sum(), nats.new_tensor(nats.numel())]
        *sums, positions = _sum_over_ranks(torch.stack([count.double() for count in counts]))
        if self.sums is None or self.is_complete:
            self.is_complete, self.backwards, self.first = False, 0, batches_trained(trainer)
            self.sums = torch.zeros_like(torch.stack(sums))
            self.unit = torch.where(sums[0] > 0, sums[0], positions) / rank_and_size()[1]
        self.sums = self.sums + torch.stack(sums)
        self.backwards += 1
        self.next_place = batch_idx % trainer.accumulate_grad_batches + 1
        return nats.sum() / self.unit.to(nats.dtype)

    def means(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return nats per token and nats per byte of the step so far, averaged over all ranks."""
        assert self.sums is not None
        tokens, nats, num_bytes = self.sums
        return nats / tokens.clamp(min=1), nats / num_bytes

    def finish(self, parameters: Iterable[nn.Parameter], accumulate_grad_batches: int) -> None:
        """Scale the accumulated gradients to the mean over the step's tokens; call after the last backward pass."""
        assert self.sums is not None
        _, size = rank_and_size()
        factor = self.unit * accumulate_grad_batches * size / self.sums[0].clamp(min=1)
        for parameter in parameters:
            if parameter.grad is not None:
                _local(parameter.grad).mul_(factor)
        self.is_complete = True

    def state_dict(self, module: nn.Module, trainer: L.Trainer) -> dict[str, Any] | None:
        """Return the state of a step under way, or None between steps. Every rank must call this method.

        An exception may have cut short a backward pass. Its partial gradients cannot be separated from the earlier
        ones, so the checkpoint stores none, and training refuses to resume from it.
        """
        done = batches_trained(trainer) - self.first
        if self.sums is None or done == 0 or (self.is_complete and done >= self.backwards):
            return None
        state = {"batches": done, "accumulate_grad_batches": trainer.accumulate_grad_batches}
        if self.backwards > done:
            return state | {"gradients": None}
        return state | {
            "next_place": self.next_place,
            "sums": self.sums.tolist(),
            "unit": self.unit.item(),
            "ranks": rank_and_size()[1],
            "averaged": _is_sharded(module),
            "gradients": gather_gradients(module),
        }

    def load_state_dict(self, loaded: dict[str, Any], module: nn.Module, trainer: L.Trainer) -> None:
        """Restore the step that was under way when the checkpoint was written.

        Raises:
            ValueError: the gradients are incomplete, or accumulate_grad_batches has changed.
        """
        batches, size = loaded["batches"], loaded["accumulate_grad_batches"]
        if loaded["gradients"] is None:
            raise ValueError(
                f"ckpt_path={trainer.ckpt_path} has incomplete gradients, because an error interrupted the backward "
                f"pass of batch {batches + 1} of accumulate_grad_batches={size}; resume from another checkpoint"
            )
        if size != trainer.accumulate_grad_batches:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}, but the checkpoint was written "
                f"after {batches} of {size} batches; set it to {size}, or resume from a checkpoint between steps"
            )
        device = next(module.parameters()).device
        self.sums = torch.tensor(loaded["sums"], dtype=torch.float64, device=device)
        self.unit = torch.tensor(loaded["unit"], dtype=torch.float64, device=device)
        self.first, self.backwards = batches_trained(trainer) - batches, batches
        self.next_place, self.is_complete = loaded["next_place"], False
        set_gradients(module, loaded["gradients"], loaded["ranks"], loaded["averaged"])

    def check_place(self, module: nn.Module, trainer: L.Trainer, batch_idx: int) -> None:
        """Drop a resumed step, with a warning, if the run resumes at an epoch's start but the checkpoint did not."""
        under_way = self.sums is not None and not self.is_complete
        if under_way and self.next_place != batch_idx % trainer.accumulate_grad_batches:
            size = trainer.accumulate_grad_batches
            rank_zero_warn(
                f"dropped the {self.backwards} of accumulate_grad_batches={size} batches that the checkpoint had "
                "accumulated, because the run resumes at an epoch's start"
            )
            module.zero_grad(set_to_none=True)
            self.sums = None


def check_epochs(trainer: L.Trainer) -> None:
    """Raise a ValueError if the end of an epoch would cut an optimiser step short."""
    batches, sizes = trainer.num_training_batches, accumulations(trainer)
    within_one = trainer.max_steps != -1 and trainer.max_steps * max(sizes) <= batches
    if within_one or trainer.fast_dev_run or batches == float("inf"):
        return
    size = next((size for size in sorted(sizes) if batches % size), None)
    if size is None:
        return
    limit = "overfit_batches" if trainer.overfit_batches else "limit_train_batches"
    limited = f" (trainer.{limit}={getattr(trainer, limit)})" if getattr(trainer, limit) != 1.0 else ""
    whole = int(batches // size * size)
    fewer = f"set trainer.{limit} to {whole} or another multiple, or " if whole else "set "
    raise ValueError(
        f"an epoch of {batches} batches{limited} ends within an optimiser step of accumulate_grad_batches={size}: "
        f"{fewer}trainer.accumulate_grad_batches to a divisor of {batches}"
    )


def gather_gradients(module: nn.Module) -> list[Gradients]:
    """Gather every rank's gradients on rank 0, on the CPU; sharded gradients form a single part."""
    rank, size = rank_and_size()
    parts: list[Gradients] = [{} for _ in range(1 if _is_sharded(module) else size)]
    parameters = dict(module.named_parameters())
    for (name, parameter), used in zip(parameters.items(), _used(list(parameters.values())), strict=True):
        if not used:
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
        for part, value in zip(parts, _gathered(grad), strict=False):
            if rank == 0:
                part[name] = value.to("cpu", copy=True)
    return parts


def set_gradients(module: nn.Module, parts: list[Gradients], ranks: int, averaged: bool) -> None:
    """Give this rank its share of gathered gradients, bit for bit if the number of ranks is unchanged.

    Args:
        module: receives the gradients.
        parts: gradients of each rank, or a single part with the whole gradients.
        ranks: number of ranks that gathered them.
        averaged: True if they are already means over those ranks, as sharded gradients are.
    """
    (rank, size), sharded = rank_and_size(), _is_sharded(module)
    scale = 1.0
    if averaged:
        parts, scale = (parts, ranks / size) if sharded else (parts if rank == 0 else [], ranks)
    elif sharded:
        scale = 1 / size
    else:
        parts = parts[rank::size]
    for name, parameter in module.named_parameters():
        values = [part[name].to(parameter.device) for part in parts if name in part]
        if values:
            total = values[0] if len(values) == 1 else torch.stack(values).sum(0)
            parameter.grad = _like(parameter, total if scale == 1 else total * scale)


def _sum_over_ranks(x: Tensor) -> Tensor:
    if rank_and_size()[1] > 1:
        dist.all_reduce(x)
    return x


def _used(parameters: list[nn.Parameter]) -> list[bool]:
    """Return, for each parameter, True if any rank has a gradient for it."""
    used = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    return (_sum_over_ranks(used) > 0).tolist()


def _gathered(grad: Tensor) -> list[Tensor]:
    """Return every rank's gradient on rank 0, or the full tensor of a sharded gradient."""
    rank, size = rank_and_size()
    if isinstance(grad, DTensor):
        return [grad.full_tensor()]
    if size == 1:
        return [grad]
    grads = [torch.empty_like(grad) for _ in range(size)] if rank == 0 else None
    dist.gather(grad.contiguous(), grads)
    return grads or []


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def _like(parameter: nn.Parameter, whole: Float[Tensor, "*shape"]) -> Tensor:
    """Return a gradient with the sharding of its parameter."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad
