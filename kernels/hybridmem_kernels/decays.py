"""Decay rows: the shares of each write and of the chunk's initial state that remain at every token of a chunk.

Within a chunk the state is linear in its inputs x = [W_0, S_0, u_1 .. u_C], where u_j = -k_j delta_j^T is the write of
token j without its step size:

    W_i = sum_x weight_rows[i, x] x          S_i = sum_x momentum_rows[i, x] x

The rows follow from running the recurrence on unit inputs:

    momentum_rows[i] = eta_i momentum_rows[i-1] + theta_i e_i
    weight_rows[i]   = keep_i weight_rows[i-1] + active_i momentum_rows[i]

They are R_s and R_w in equations 4 and 5 of memory_scan/README.md, whose a, p and D are columns 0, 1 and 2 .. C + 1 of
R_w. Products of numbers in [0, 1] neither overflow nor need logarithms. A reset (keep = eta = 0) and its gradients are
exact.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def decay_rows(
    keep: Float[Tensor, "chunks size"],
    eta: Float[Tensor, "chunks size"],
    theta: Float[Tensor, "chunks size"],
    active: Float[Tensor, "chunks size"] | None = None,
) -> tuple[Float[Tensor, "chunks size+1 size+2"], Float[Tensor, "chunks size+1 size+2"]]:
    """Compute (weight_rows, momentum_rows); row 0 describes the chunk's start, row i the state after token i."""
    chunks, size = keep.shape
    momentum_rows = keep.new_zeros(chunks, size + 1, size + 2)
    momentum_rows[:, 0, 1] = 1
    momentum_rows[:, 1:, 2:].diagonal(dim1=1, dim2=2).copy_(theta)
    weight_rows = torch.empty_like(momentum_rows)
    weight_rows[:, 0] = 0
    weight_rows[:, 0, 0] = 1
    keep, eta = keep.unsqueeze(-1), eta.unsqueeze(-1)
    for i in range(size):
        row = momentum_rows[:, i + 1].addcmul_(eta[:, i], momentum_rows[:, i])
        if active is not None:
            row = row * active[:, i, None]
        torch.addcmul(row, keep[:, i], weight_rows[:, i], out=weight_rows[:, i + 1])
    return weight_rows, momentum_rows


def decay_rows_backward(
    keep: Float[Tensor, "chunks size"],
    eta: Float[Tensor, "chunks size"],
    active: Float[Tensor, "chunks size"] | None,
    weight_rows: Float[Tensor, "chunks size+1 size+2"],
    momentum_rows: Float[Tensor, "chunks size+1 size+2"],
    grad_weight_rows: Float[Tensor, "chunks size+1 size+2"],
    grad_momentum_rows: Float[Tensor, "chunks size+1 size+2"],
) -> tuple[Float[Tensor, "chunks size"], Float[Tensor, "chunks size"], Float[Tensor, "chunks size"]]:
    """Compute the gradients of (keep, eta, theta); the two given gradients are overwritten."""
    keep_, eta_ = keep.unsqueeze(-1), eta.unsqueeze(-1)
    for i in reversed(range(keep.shape[1])):
        grad_row = grad_weight_rows[:, i + 1]
        if active is None:
            grad_momentum_rows[:, i + 1].add_(grad_row)
        else:
            grad_momentum_rows[:, i + 1].addcmul_(active[:, i, None], grad_row)
        grad_weight_rows[:, i].addcmul_(keep_[:, i], grad_row)
        grad_momentum_rows[:, i].addcmul_(eta_[:, i], grad_momentum_rows[:, i + 1])
    grad_keep = torch.linalg.vecdot(grad_weight_rows[:, 1:], weight_rows[:, :-1])
    grad_eta = torch.linalg.vecdot(grad_momentum_rows[:, 1:], momentum_rows[:, :-1])
    grad_theta = grad_momentum_rows[:, 1:, 2:].diagonal(dim1=1, dim2=2)
    return grad_keep, grad_eta, grad_theta


class DecayRows(torch.autograd.Function):
    """Autograd function of `decay_rows`, with one recurrence per pass instead of an autograd node per row."""

    @staticmethod
    def forward(ctx, keep, eta, theta, active):  # noqa: D102
        weight_rows, momentum_rows = decay_rows(keep, eta, theta, active)
        ctx.save_for_backward(keep, eta, active, weight_rows, momentum_rows)
        return weight_rows, momentum_rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight_rows, grad_momentum_rows):  # noqa: D102
        keep, eta, active, *rows = ctx.saved_tensors
        grads = (grad_weight_rows.clone(), grad_momentum_rows.clone())
        return *decay_rows_backward(keep, eta, active, rows[0], rows[1], *grads), None
