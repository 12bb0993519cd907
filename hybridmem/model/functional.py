"""Small differentiable functions with hand-written backwards.

On a CPU these functions are bound by memory traffic: autograd's composite backward of a norm takes ten times as long as
the norm. The implementations here make as few passes over the data as possible. torch.compile fuses passes by itself,
so compiled graphs use the same formulas in plain PyTorch.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PRECISE = (torch.float32, torch.float64)


def linear_rows(
    linear: nn.Module, x: Float[Tensor, "*lead inputs"], start: int, stop: int | None = None
) -> Float[Tensor, "*lead rows"]:
    """Return the outputs `start` to `stop` of a linear layer."""
    # Adapters that replace the layer, and hooks that load its weight, take effect only when the layer is called.
    if type(linear) is nn.Linear and "forward" not in vars(linear):
        return F.linear(x, linear.weight[start:stop])
    return linear(x)[..., start:stop]


def rms_norm(x: Float[Tensor, "*lead dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "*lead dim"]:
    """Compute x / sqrt(mean(x²) + eps) · weight over the last axis, in at least float32."""
    if x.is_cuda or torch.compiler.is_compiling():
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)
    if not torch.is_grad_enabled():
        return _normalized(x, weight, 1 / x.shape[-1], eps)[0]
    return _Normalize.apply(x, weight, 1 / x.shape[-1], eps)


def l2_normalize(x: Float[Tensor, "*lead dim"], eps: float = 1e-6) -> Float[Tensor, "*lead dim"]:
    """Compute x / sqrt(sum(x²) + eps) over the last axis: unit vectors, and zero for zero."""
    if torch.compiler.is_compiling():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    if not torch.is_grad_enabled():
        return _normalized(x, None, 1.0, eps)[0]
    return _Normalize.apply(x, None, 1.0, eps)


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast inside a function that chooses its own precision; autocast would round its sums."""

    @wraps(method)
    def precise(*arguments: Any) -> Any:
        x = arguments[0] if isinstance(arguments[0], Tensor) else arguments[1]  # after an autograd function's ctx
        if not torch.is_autocast_enabled(x.device.type):  # entering the context takes as long as a small norm
            return method(*arguments)
        with torch.autocast(x.device.type, enabled=False):
            return method(*arguments)

    return precise


@_without_autocast
def _normalized(x: Tensor, weight: Tensor | None, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return x · weight / sqrt(scale · sum(x²) + eps), and the factor of each row."""
    wide = x if x.dtype in PRECISE else x.float()
    squares = torch.linalg.vecdot(wide, wide)
    if scale != 1:
        squares.mul_(scale)
    inverse = squares.add_(eps).rsqrt_().unsqueeze(-1)
    out = wide * inverse
    if weight is not None:
        out *= weight
    return (out if wide is x else out.to(x.dtype)), inverse


class _Normalize(torch.autograd.Function):
    """y = x · weight / sqrt(scale · sum(x²) + eps)."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, scale: float, eps: float) -> Tensor:
        out, inverse = _normalized(x, weight, scale, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.scale = scale
        return out

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad = x.to(inverse.dtype), grad.to(inverse.dtype)
        grad_weight = None
        if weight is not None:
            # Multiplying by the vector of inverse norms sums over all tokens in one pass.
            grad_weight = (inverse.flatten() @ (grad * wide).reshape(-1, x.shape[-1])).to(weight.dtype)
            grad = grad * weight
        along = torch.linalg.vecdot(grad, wide).unsqueeze(-1) * inverse.pow(3).mul_(-ctx.scale)
        return (grad * inverse).addcmul_(wide, along).to(x.dtype), grad_weight, None, None


IN_CACHE = 2**16  # elements per block of a convolution, small enough to stay in the CPU cache


def causal_convolution(
    x: Float[Tensor, "batch read channels"],
    weight: Float[Tensor, "channels kernel"],
    same_document: Bool[Tensor, "batch time kernel"] | None = None,
) -> Float[Tensor, "batch time channels"]:
    """Convolve each channel over the current token and the `kernel - 1` tokens before it.

    Args:
        x: the tokens, preceded by `kernel - 1` earlier ones.
        weight: the taps; the last one applies to the current token.
        same_document: True for taps within the token's own document; None: all of them.
    """
    if torch.compiler.is_compiling():
        taps = weight.t().to(x.dtype)
        time = x.shape[1] - len(taps) + 1
        terms = (x[:, i : i + time] * tap for i, tap in enumerate(taps))
        if same_document is not None:
            terms = (term * same_document[..., i, None] for i, term in enumerate(terms))
        return torch.stack(list(terms)).sum(0)
    if x.shape[1] == weight.shape[1] and same_document is None and not torch.is_grad_enabled():
        return _convolved_token(x, weight)
    return _CausalConvolution.apply(x, weight, same_document)


@_without_autocast
def _convolved_token(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve a single token, with the roundings of `_CausalConvolution`."""
    (first, *others), (tap, *taps) = x.unbind(1), weight.to(x.dtype).unbind(1)
    out = first * tap
    for token, tap in zip(others, taps, strict=True):
        out.addcmul_(token, tap)
    return out.unsqueeze(1)


class _CausalConvolution(torch.autograd.Function):
    """Convolution with one multiply-add over the sequence per tap; a grouped convolution takes three times as long."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, weight: Tensor, same_document: Tensor | None) -> Tensor:
        taps = weight.t().contiguous().to(x.dtype)
        time = x.shape[1] - len(taps) + 1
        out = torch.zeros_like(x[:, :time])
        for row, into, same in _parts(x, out, same_document):
            for i, tap in enumerate(taps):
                into.addcmul_(row.narrow(-2, i, time), tap if same is None else same[..., i, None] * tap)
        ctx.save_for_backward(x, taps, same_document)
        ctx.weight_dtype = weight.dtype
        return out

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, taps, same_document = ctx.saved_tensors
        time = grad.shape[1]
        grad_x, grad_taps = torch.zeros_like(x), torch.zeros_like(taps)
        for row, into, through, same in _parts(x, grad_x, grad, same_document):
            for i, tap in enumerate(taps):
                masked = through if same is None else through * same[..., i, None]
                into.narrow(-2, i, time).addcmul_(masked, tap)
                grad_taps[i] += (masked * row.narrow(-2, i, time)).flatten(0, -2).sum(0)
        return grad_x, grad_taps.t().to(ctx.weight_dtype), None


def _parts(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Split tensors into blocks of rows on the CPU, so that a block stays in the cache for all taps.

    The last tensor is a mask. It is replaced by None for rows where it is all True.
    """
    *data, mask = tensors
    first = data[0]
    assert first is not None
    if first.device.type != "cpu":
        return iter([tensors])
    rows = max(1, IN_CACHE // max(1, first[:1].numel()))
    masks = repeat(None) if mask is None else (None if part.all() else part for part in mask.split(rows))
    return zip(*(x.split(rows) for x in data if x is not None), masks, strict=False)


def rotate(
    x: Float[Tensor, "batch heads time dim"],
    cos: Float[Tensor, "rows 1 time half"],
    sin: Float[Tensor, "rows 1 time half"],
) -> Float[Tensor, "batch heads time dim"]:
    """Rotate channels i and i + half by the i-th angle, and leave the rest unchanged (RoPE, arXiv 2104.09864)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return _turn(x, cos, sin, 1)
    return _Rotate.apply(x, cos, sin)


def rotate_as_pretrained(
    x: Float[Tensor, "batch heads time dim"],
    cos: Float[Tensor, "rows 1 time turning"],
    sin: Float[Tensor, "rows 1 time turning"],
) -> Float[Tensor, "batch heads time dim"]:
    """Apply `rotate` with the rounding of transformers' models; each angle is given for both of its channels."""
    dim = cos.shape[-1]
    turning = x if dim == x.shape[-1] else x[..., :dim]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if turning is x else torch.cat((turned, x[..., dim:]), dim=-1)


class _Rotate(torch.autograd.Function):
    """Rotation whose backward is the inverse rotation."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned_first = (first * cos).addcmul_(second, sin, value=-direction)
    turned_second = (second * cos).addcmul_(first, sin, value=direction)
    return torch.cat((turned_first, turned_second, x[..., 2 * half :]), dim=-1)
