"""One chunk of the deep memory, with hand-written forward and backward.

The chunk's first weights (anchors A_n) give each layer's inputs a_n and errors e_n; the gradient of its matrix is
a_n^T e_n. With f the factor that bounds a token's gradient, u = R_w[C] theta f, and y_n the output for queries x_n,

    y_n = R_w[:, 0] x_n W_n + R_w[:, 1] x_n S_n - ((x_n a_n^T) * D theta f) e_n          x_{n+1} = silu(y_n)
    W'_n = R_w[C, 0] W_n + R_w[C, 1] S_n - (a_n * u)^T e_n

and likewise S'_n with R_s. The backward differentiates these equations, then the errors, then the MLP over the keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LaneWeights = Sequence[Float[Tensor, "lanes _ _"]]  # one matrix per layer; a lane is a (batch, head) pair


class ChunkInputs(NamedTuple):
    """Inputs of one chunk of every lane."""

    q: Float[Tensor, "lanes width dim"]
    k: Float[Tensor, "lanes width dim"]
    v: Float[Tensor, "lanes width dim"]
    theta: Float[Tensor, "lanes width"]
    weight_rows: Float[Tensor, "lanes rows columns"]
    momentum_rows: Float[Tensor, "lanes rows columns"]

    @property
    def after(self) -> Float[Tensor, "lanes width columns"]:
        """Return the rows after each token's write."""
        return self.weight_rows[:, 1:]


class _Surprise(NamedTuple):
    """Forward and backward of the MLP over the keys at the anchors, and the resulting bound on the step size."""

    inputs: list[Float[Tensor, "lanes width _"]]  # a_n
    errors: list[Float[Tensor, "lanes width _"]]  # e_n
    hidden: list[Float[Tensor, "lanes width _"]]  # before each SiLU
    squares: Float[Tensor, "lanes width"] | None  # squared norms of the gradients; None: no bound
    bound: Float[Tensor, "lanes width"] | None  # f
    theta: Float[Tensor, "lanes width"]  # theta f


def chunk_forward(
    inputs: ChunkInputs, weights: LaneWeights, momenta: LaneWeights, anchors: LaneWeights, max_grad_norm: float | None
) -> tuple[Float[Tensor, "lanes width dim"], list[Tensor], list[Tensor]]:
    """Read and write one chunk; return (out, weights, momenta) after it."""
    surprise = _surprise(inputs, anchors, max_grad_norm)
    reach = inputs.after[..., 2:] * surprise.theta[:, None]
    x, new_weights, new_momenta = inputs.q, [], []
    for n, (weight, momentum) in enumerate(zip(weights, momenta, strict=True)):
        if n:
            x = F.silu(x)
        a, error = surprise.inputs[n], surprise.errors[n]
        x = _answer(inputs, x, weight, momentum, a, error, reach)
        moved, written = (_end(inputs, surprise, part)[..., None] * a for part in range(2))
        of_weight, of_momentum = _carry(inputs)
        new_weight = (of_weight[0] * weight).addcmul_(of_weight[1], momentum)
        new_weights.append(new_weight.baddbmm_(moved.mT, error, alpha=-1))
        new_momenta.append((of_momentum * momentum).baddbmm_(written.mT, error, alpha=-1))
    return inputs.q + x, new_weights, new_momenta


def chunk_backward(
    inputs: ChunkInputs,
    weights: LaneWeights,
    momenta: LaneWeights,
    anchors: LaneWeights,
    max_grad_norm: float | None,
    grad_out: Float[Tensor, "lanes width dim"],
    grad_weights: LaneWeights,
    grad_momenta: LaneWeights,
    into: ChunkInputs,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Compute the gradients of (weights, momenta, anchors) from the gradients of the results of `chunk_forward`.

    The gradients of the inputs are written to `into`, whose decay rows must be zero on entry.
    """
    surprise = _surprise(inputs, anchors, max_grad_norm)
    after, reach = inputs.after, inputs.after[..., 2:] * surprise.theta[:, None]
    answers = _answers(inputs, surprise, weights, momenta, reach)
    of_weight, of_momentum = _carry(inputs)
    grad_inputs = [torch.zeros_like(a) for a in surprise.inputs]
    grad_errors = [torch.zeros_like(e) for e in surprise.errors]
    grad_reach = torch.zeros_like(reach)
    grad_ends = [torch.zeros_like(inputs.theta) for _ in range(2)]
    grad_after, end_of_weight, end_of_momentum = into.after, into.weight_rows[:, -1], into.momentum_rows[:, -1]
    new_weights, new_momenta, grad = [], [], grad_out
    for n in reversed(range(len(weights))):
        weight, momentum, a, error = weights[n], momenta[n], surprise.inputs[n], surprise.errors[n]
        x = F.silu(answers[n]) if n else answers[n]
        through_weight, through_momentum = grad * after[..., 0, None], grad * after[..., 1, None]
        by_weight, by_momentum = torch.bmm(grad, weight.mT), torch.bmm(grad, momentum.mT)
        to_weight, to_momentum = grad_weights[n], grad_momenta[n]
        for column, pulled in enumerate((by_weight, by_momentum)):
            grad_after[..., column] += torch.linalg.vecdot(x, pulled)
        products = torch.bmm(x, a.mT)
        grad_mix = torch.bmm(grad, error.mT).neg_()
        grad_errors[n].baddbmm_((products * reach).mT, grad, alpha=-1)
        grad_reach.addcmul_(grad_mix, products)
        grad_products = grad_mix.mul_(reach)
        grad_inputs[n].baddbmm_(grad_products.mT, x)
        grad = by_weight.mul_(after[..., 0, None]).addcmul_(by_momentum, after[..., 1, None]).baddbmm_(grad_products, a)
        if n:
            grad = grad.mul_(_silu_slope(answers[n]))

        for part, to in enumerate((to_weight, to_momentum)):
            end = _end(inputs, surprise, part)[..., None]
            pulled = torch.bmm(error, to.mT)
            grad_errors[n].baddbmm_(a * end, to, alpha=-1)
            grad_ends[part] -= torch.linalg.vecdot(pulled, a)
            grad_inputs[n].addcmul_(pulled, end, value=-1)
        end_of_weight[:, 0] += _dot(to_weight, weight)
        end_of_weight[:, 1] += _dot(to_weight, momentum)
        end_of_momentum[:, 1] += _dot(to_momentum, momentum)
        new_weights.append((of_weight[0] * to_weight).baddbmm_(x.mT, through_weight))
        moved = (of_weight[1] * to_weight).addcmul_(of_momentum, to_momentum)
        new_momenta.append(moved.baddbmm_(x.mT, through_momentum))
    torch.add(grad_out, grad, out=into.q)

    grad_theta = torch.linalg.vecdot(grad_reach, after[..., 2:], dim=1)
    grad_after[..., 2:] += grad_reach.mul_(surprise.theta[:, None])
    for end, of_end, rows in zip(grad_ends, (end_of_weight, end_of_momentum), inputs[4:], strict=True):
        of_end[:, 2:].addcmul_(end, surprise.theta)
        grad_theta.addcmul_(end, rows[:, -1, 2:])
    _bound_backward(inputs, surprise, grad_theta, grad_inputs, grad_errors, into.theta)
    grad_anchors = _surprise_backward(anchors, surprise, grad_inputs, grad_errors, into)
    return new_weights[::-1], new_momenta[::-1], grad_anchors


def _surprise(inputs: ChunkInputs, anchors: LaneWeights, max_grad_norm: float | None) -> _Surprise:
    layer_inputs, hidden = [inputs.k], []
    for anchor in anchors[:-1]:
        hidden.append(torch.bmm(layer_inputs[-1], anchor))
        layer_inputs.append(F.silu(hidden[-1]))
    errors = [torch.bmm(layer_inputs[-1], anchors[-1]).add_(inputs.k).sub_(inputs.v)]
    for anchor, z in zip(reversed(anchors[1:]), reversed(hidden), strict=True):
        errors.append(torch.bmm(errors[-1], anchor.mT).mul_(_silu_slope(z)))
    errors.reverse()
    squares = bound = None
    theta = inputs.theta
    if max_grad_norm is not None:
        norms = (_squares(a) * _squares(e) for a, e in zip(layer_inputs, errors, strict=True))
        squares = torch.stack(list(norms)).sum(0)
        bound = max_grad_norm * squares.clamp(min=max_grad_norm**2).rsqrt()
        theta = theta * bound
    return _Surprise(layer_inputs, errors, hidden, squares, bound, theta)


def _answers(
    inputs: ChunkInputs, surprise: _Surprise, weights: LaneWeights, momenta: LaneWeights, reach: Tensor
) -> list[Tensor]:
    """Compute the input of each layer for the queries, before SiLU."""
    answers = [inputs.q]
    for n, (weight, momentum) in enumerate(zip(weights[:-1], momenta[:-1], strict=True)):
        x = F.silu(answers[-1]) if n else answers[-1]
        answers.append(_answer(inputs, x, weight, momentum, surprise.inputs[n], surprise.errors[n], reach))
    return answers


def _answer(
    inputs: ChunkInputs, x: Tensor, weight: Tensor, momentum: Tensor, a: Tensor, error: Tensor, reach: Tensor
) -> Float[Tensor, "lanes width _"]:
    """Compute the output y_n of one layer for `x`."""
    read = torch.bmm(x, weight).mul_(inputs.after[..., 0, None])
    read.addcmul_(torch.bmm(x, momentum), inputs.after[..., 1, None])
    return read.baddbmm_(torch.bmm(x, a.mT).mul_(reach), error, alpha=-1)


def _bound_backward(
    inputs: ChunkInputs,
    surprise: _Surprise,
    grad_theta: Float[Tensor, "lanes width"],
    grad_inputs: list[Tensor],
    grad_errors: list[Tensor],
    into_theta: Float[Tensor, "lanes width"],
) -> None:
    """Backpropagate through theta f, where f = max_grad_norm / norm if the norm is larger, and 1 otherwise."""
    if surprise.bound is None or surprise.squares is None:
        into_theta.copy_(grad_theta)
        return
    torch.mul(grad_theta, surprise.bound, out=into_theta)
    # df / d norm² = -f / (2 norm²); the 2 cancels with the derivative of the square.
    slope = (grad_theta * surprise.theta / surprise.squares).where(surprise.bound < 1, 0)
    for a, e, grad_a, grad_e in zip(surprise.inputs, surprise.errors, grad_inputs, grad_errors, strict=True):
        grad_a.addcmul_(a, (slope * _squares(e)).unsqueeze(-1), value=-1)
        grad_e.addcmul_(e, (slope * _squares(a)).unsqueeze(-1), value=-1)


def _surprise_backward(
    anchors: LaneWeights,
    surprise: _Surprise,
    grad_inputs: list[Tensor],
    grad_errors: list[Tensor],
    into: ChunkInputs,
) -> list[Tensor]:
    """Backpropagate through the errors, then the MLP; return the gradients of the anchors, write those of k and v."""
    grad_anchors: list[Tensor] = [torch.zeros_like(anchor) for anchor in anchors]
    grad_hidden = []
    for n, z in enumerate(surprise.hidden):
        error, anchor = surprise.errors[n + 1], anchors[n + 1]
        pulled = grad_errors[n] * _silu_slope(z)
        grad_anchors[n + 1].baddbmm_(pulled.mT, error)
        grad_errors[n + 1].baddbmm_(pulled, anchor)
        grad_hidden.append(torch.bmm(error, anchor.mT).mul_(grad_errors[n]).mul_(_silu_curve(z)))
    last = grad_errors[-1]
    torch.neg(last, out=into.v)
    grad_anchors[-1].baddbmm_(surprise.inputs[-1].mT, last)
    grad_inputs[-1].baddbmm_(last, anchors[-1].mT)
    for n in reversed(range(len(surprise.hidden))):
        grad = grad_hidden[n].addcmul_(grad_inputs[n + 1], _silu_slope(surprise.hidden[n]))
        grad_anchors[n].baddbmm_(surprise.inputs[n].mT, grad)
        grad_inputs[n].baddbmm_(grad, anchors[n].mT)
    torch.add(grad_inputs[0], last, out=into.k)
    return grad_anchors


def _carry(inputs: ChunkInputs) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the state's decays over a chunk: (weights to weights, momenta to weights), momenta to momenta."""
    end_of_weight, end_of_momentum = (
        inputs.weight_rows[:, -1, :2, None, None],
        inputs.momentum_rows[:, -1, 1, None, None],
    )
    return (end_of_weight[:, 0], end_of_weight[:, 1]), end_of_momentum


def _end(inputs: ChunkInputs, surprise: _Surprise, part: int) -> Float[Tensor, "lanes width"]:
    """Return the share of each write that remains at the chunk's end, in the weights (part 0) or the momenta (1)."""
    return inputs[4 + part][:, -1, 2:] * surprise.theta


def _squares(x: Float[Tensor, "lanes width dim"]) -> Float[Tensor, "lanes width"]:
    return torch.linalg.vecdot(x, x)


def _dot(x: Float[Tensor, "lanes rows columns"], y: Float[Tensor, "lanes rows columns"]) -> Float[Tensor, " lanes"]:
    return torch.linalg.vecdot(x.flatten(1), y.flatten(1))


def _silu_slope(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return (1 - gate).mul_(z).add_(1).mul_(gate)


def _silu_curve(z: Tensor) -> Tensor:
    """Return the second derivative of SiLU."""
    gate = torch.sigmoid(z)
    return (1 - 2 * gate).mul_(z).add_(2).mul_(gate).mul_(1 - gate)
