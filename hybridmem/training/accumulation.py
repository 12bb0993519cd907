"""Gradient accumulation weighted by tokens, and its place in checkpoints.

Lightning adds up the gradients of loss / A over A = accumulate_grad_batches batches, and averages them over R ranks.
Taking the mean over tokens in each batch would weigh a short batch like a long one. Here a batch's loss is

    loss = sum of nats / unit           unit: one number for all batches and ranks of an optimiser step

so that one factor, A · R · unit / (tokens of the step), makes the accumulated gradient that of the mean over all
tokens, as if the step were a single batch. `unit` is close to a batch's tokens on a rank: gradients keep the
magnitude that they have without accumulation, which matters in float16.
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
    """The batches of one optimiser step: how many tokens they predict, and how far the step has come."""

    def __init__(self) -> None:
        self.sums: Float[Tensor, " sums"] | None = None  # tokens, nats and bytes of all ranks, once there is a batch
        self.unit: Float[Tensor, ""] = torch.ones(())
        self.first = 0  # the number of the step's first batch, counted over the whole run
        self.backwards = 0  # backward passes that have begun
        self.next_place = 0  # place of the next batch among Lightning's accumulate_grad_batches
        self.is_complete = False  # the last backward pass is done

    def loss(
        self, trainer: L.Trainer, batch_idx: int, nats: Float[Tensor, "batch time"], labels: Tensor, num_bytes: Tensor
    ) -> Float[Tensor, ""]:
        """Count a batch of this rank and return its loss, whose backward pass follows."""
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
        """Return nats per token and nats per byte of the step so far, over all ranks."""
        assert self.sums is not None
        tokens, nats, num_bytes = self.sums
        return nats / tokens.clamp(min=1), nats / num_bytes

    def finish(self, parameters: Iterable[nn.Parameter], accumulate_grad_batches: int) -> None:
        """Scale the accumulated gradients to the mean over the step's tokens, after its last backward pass."""
        assert self.sums is not None
        _, size = rank_and_size()
        factor = self.unit * accumulate_grad_batches * size / self.sums[0].clamp(min=1)
        for parameter in parameters:
            if parameter.grad is not None:
                _local(parameter.grad).mul_(factor)
        self.is_complete = True

    def state_dict(self, module: nn.Module, trainer: L.Trainer) -> dict[str, Any] | None:
        """Return what a checkpoint needs of a step under way, or None between steps; every rank has to call it.

        A checkpoint written on an exception may find a batch's backward pass cut short. Its gradients cannot be told
        from those before, and are left out: training refuses to resume from there.
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
        """Take up the step under way that a checkpoint holds.

        Raises:
            ValueError: the checkpoint's gradients are not those of whole batches, or of another accumulation.
        """
        batches, size = loaded["batches"], loaded["accumulate_grad_batches"]
        if loaded["gradients"] is None:
            raise ValueError(
                f"ckpt_path={trainer.ckpt_path} was written when an error cut the backward pass of batch {batches + 1} "
                f"of accumulate_grad_batches={size}: its gradients are incomplete; resume from another checkpoint"
            )
        if size != trainer.accumulate_grad_batches:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}, but the checkpoint was written "
                f"after {batches} of {size} batches: resume with {size}, or from a checkpoint of a step's end"
            )
        device = next(module.parameters()).device
        self.sums = torch.tensor(loaded["sums"], dtype=torch.float64, device=device)
        self.unit = torch.tensor(loaded["unit"], dtype=torch.float64, device=device)
        self.first, self.backwards = batches_trained(trainer) - batches, batches
        self.next_place, self.is_complete = loaded["next_place"], False
        set_gradients(module, loaded["gradients"], loaded["ranks"], loaded["averaged"])

    def check_place(self, module: nn.Module, trainer: L.Trainer, batch_idx: int) -> None:
        """Drop a resumed step, with a warning, if the epoch begins anew where the checkpoint's did not."""
        under_way = self.sums is not None and not self.is_complete
        if under_way and self.next_place != batch_idx % trainer.accumulate_grad_batches:
            size = trainer.accumulate_grad_batches
            rank_zero_warn(
                f"the checkpoint had accumulated {self.backwards} of accumulate_grad_batches={size} batches, which are "
                "left out, since the run resumes at an epoch's start"
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
    """Return the gradients of every rank, on the CPU; only rank 0 gets them. Sharded ones make one whole part."""
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
    """Give a rank its share of gathered gradients, bit for bit if there are as many ranks as before.

    Args:
        module: whose parameters they belong to.
        parts: of every rank, or one whole part.
        ranks: of the run that gathered them.
        averaged: whether they are means over those ranks already, as sharded ones are.
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
    """Return which parameters have a gradient on any rank."""
    used = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    return (_sum_over_ranks(used) > 0).tolist()


def _gathered(grad: Tensor) -> list[Tensor]:
    """Return a gradient of every rank on rank 0, or the whole of a sharded one."""
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
    """Return a gradient sharded as its parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad
